"""How good the predictions are, on everything that was measured and is known mix by mix.

Three questions. Leave-one-out: a mix of a model, from the model's other mixes (a mix measured
twice counts as one). Leave-model-out: every mix of a model, from the prior and its base PPL alone,
with hyper-parameters fitted without that model. Leave-tool-out: recipes that a tool solved tensor
by tensor, from the mixes that people made class by class. The first two next to controls.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from quantmix.loss import calibrate, cases, controls, evidence, prior, scores, trust
from quantmix.loss.calibrate import Hyper, Row
from quantmix.loss.outcome import Outcome, Pair
from quantmix.models.catalog import catalog

# Bands and comparisons count predictions with at least this many other mixes of the model known.
ENOUGH: Final = 4
_SAME_BPW: Final = 0.03
_TELLING_LN: Final = 0.005
_MAX_PAIRS: Final = 60
# Rows of a tool that assigns types tensor by tensor: a recipe file, or a published recipe.
_SOLVED: Final = re.compile(r"^recipe |\.recipe")


def run(measurements: Path | None = None, recipes: Path | None = None) -> dict[str, Any]:
    """Backtest on package data, and on `measurements` and `recipes` where given.

    Args:
        measurements: CSV of measured perplexities (columns in docs/loss-model.md), added to the
            published ones.
        recipes: folder or .tar.gz of recipes with `-3.4451ppl` in their names.

    Returns:
        The document of `backtest --json` (docs/interface.md, backtest); rows are leave-one-out
        predictions in PPL.

    Raises:
        BadFile: a file cannot be read.
    """
    known, skipped = _known(measurements)
    found, more = cases.gather(known, recipes)
    skipped += more + [s for c in found for s in _not_judged(c)]
    apart = {c.model.id for c in found if fails(c)}
    single = [o for c in found for o in leave_one_out(c, without(c.model.id))]
    whole = []
    for case in found:
        if case.bench.base_known:
            whole += leave_model_out(case, without(case.model.id))
        elif case.exact:
            why = "leave-model-out needs the base perplexity, which nobody published"
            skipped.append((f"{case.model.id}: {len(case.exact)} mixes", why))
    tool = [
        o for c in found if c.model.id not in apart for o in leave_tool_out(c, without(c.model.id))
    ]
    fair = [o for o in single if o.model not in apart and o.n_known >= ENOUGH]
    few = [o for o in single if o.model not in apart and o.n_known < ENOUGH]
    blind = [o for o in whole if o.model not in apart]
    bad = [o for o in single if o.model in apart]
    pairs = [p for c in found if c.model.id not in apart for p in equal_size_pairs(c)]
    return {
        "n": len(single),
        "bands": scores.bands(fair),
        "controls": _controls(fair),
        "order": scores.order(pairs),
        "loses": losses(fair),
        "few_known": {"bands": scores.bands(few)},
        "shown_apart": {
            "models": sorted(apart),
            "why": "a tenth of their mixes measure more than 1 % below the unquantized model",
            "bands": scores.bands(bad),
        },
        "everything": {"bands": scores.bands(single)},
        "leave_model_out": {
            "bands": scores.bands(blind),
            "by_size": scores.bands(blind, lambda o: o.by_size),
            "rows": [_row(o, apart) for o in whole],
        },
        "leave_tool_out": {
            "bands": scores.bands(tool),
            "rows": [_row(o, apart) for o in tool],
        },
        "rows": [_row(o, apart) for o in single],
        "skipped": [{"id": name, "why": why} for name, why in skipped],
    }


def _known(file: Path | None) -> tuple[list[evidence.Published], list[tuple[str, str]]]:
    """Return published rows and those of `file` that are of the bench, each once."""
    rows = list(evidence.published())
    if file is None:
        return rows, []
    have = {(r.model, r.label, r.ppl) for r in rows}
    skipped = []
    for row in evidence.read_csv(file):
        if row.model not in catalog():
            skipped.append((f"{row.model}: {row.label}", "the catalog has no such model"))
        elif row.corpus != evidence.CORPUS or row.n_ctx != evidence.N_CTX:
            skipped.append((f"{row.model}: {row.label}", "another corpus or context length"))
        elif (row.model, row.label, row.ppl) not in have:
            rows.append(row)
    return rows, skipped


def _not_judged(case: cases.Cases) -> list[tuple[str, str]]:
    """Return the rows that serve as evidence but cannot be predicted, with why."""
    exact = set(case.exact)
    return [
        (
            f"{case.model.id}: {row.id}",
            "unquantized" if row.exact else "only its size is published: evidence, not judged",
        )
        for i, row in enumerate(case.bench.rows)
        if i not in exact
    ]


def without(model_id: str) -> Hyper:
    """Return the hyper-parameters that were fitted without that model."""
    return calibrate.hyper(model_id)


def fails(case: cases.Cases) -> bool:
    """Whether perplexity says nothing about quantization on this model.

    Then at least a tenth of its mixes lie more than 1 % *below* the unquantized model: rounding
    noise cannot improve a model, so what is measured there is something else.
    """
    below = [case.bench.rows[i].ln_ppl < case.bench.ln_base - 0.01 for i in case.exact]
    return case.bench.base_known and len(below) > 0 and sum(below) >= 0.1 * len(below)


def others(case: cases.Cases, *left_out: int) -> list[int]:
    """Return the rows that may be known when `left_out` are predicted: not they, nor twins."""
    rows = case.bench.rows
    return [
        j
        for j in range(len(rows))
        if j not in left_out
        and not any(rows[j].exact and np.array_equal(rows[j].w, rows[i].w) for i in left_out)
    ]


def predictions(
    case: cases.Cases,
    h: Hyper,
    *,
    loose_only: bool = False,
    prior_only: bool = False,
    inflate: bool = True,
) -> list[tuple[calibrate.Prediction, float]]:
    """Return leave-one-out predictions of the exact rows, each with the measured ln PPL.

    With `loose_only` the evidence is the rows of which only the size is known (none: no result);
    with `prior_only` there is none. Without `inflate` a model's own scatter widens nothing.
    """
    rows = case.bench.rows
    loose = [j for j, r in enumerate(rows) if not r.exact]
    if loose_only and (not loose or not case.bench.base_known):
        return []
    fixed: list[int] | None = loose if loose_only else [] if prior_only else None
    keep = [others(case, i) if fixed is None else fixed for i in case.exact]
    return [
        (_predict(case, rows, k, i, h, inflate=inflate), rows[i].ln_ppl)
        for i, k in zip(case.exact, keep, strict=True)
    ]


def leave_one_out(case: cases.Cases, h: Hyper) -> list[Outcome]:
    """Predict every exact row of a model from the others, and with both controls."""
    rows = case.bench.rows
    out = []
    for i in case.exact:
        keep = others(case, i)
        n_known = sum(rows[j].exact for j in keep)
        outcome = _outcome(case, i, _predict(case, rows, keep, i, h), h)
        if n_known >= ENOUGH:
            outcome = replace(
                outcome,
                n_known=n_known,
                bpw_only=_by_bpw(case, keep, rows[i].bpw),
                by_size=_predict(case, case.by_size, keep, i, h).ln_ppl,
            )
        out.append(outcome)
    return out


def leave_model_out(case: cases.Cases, h: Hyper) -> list[Outcome]:
    """Predict every exact row of a model from the prior and its base."""
    out = []
    for i in case.exact:
        outcome = _outcome(case, i, _predict(case, case.bench.rows, [], i, h), h)
        by_size = _predict(case, case.by_size, [], i, h).ln_ppl
        out.append(replace(outcome, by_size=by_size))
    return out


def leave_tool_out(case: cases.Cases, h: Hyper) -> list[Outcome]:
    """Predict the recipes that a tool solved by tensor from the mixes made by class.

    No outcome for a model without either kind.
    """
    return [
        replace(_outcome(case, i, p, h), n_known=n_known)
        for i, p, n_known in tool_predictions(case, h)
    ]


def tool_predictions(case: cases.Cases, h: Hyper) -> list[tuple[int, calibrate.Prediction, int]]:
    """Return row, prediction and number of known mixes of what `leave_tool_out` predicts."""
    rows = case.bench.rows
    solved = {i for i in case.exact if _SOLVED.search(rows[i].id)}
    made = [j for j in range(len(rows)) if j not in solved]
    if not made:
        return []
    out = []
    for i in sorted(solved):
        keep = [j for j in others(case, i) if j in made]
        n_known = sum(rows[j].exact for j in keep)
        out.append((i, _predict(case, rows, keep, i, h), n_known))
    return out


def equal_size_pairs(case: cases.Cases) -> list[Pair]:
    """Return who ordered each pair of mixes of one size (within 0.03 bpw, 0.5 % apart in PPL).

    Both mixes of a pair are left out. At most 60 pairs a model, evenly drawn from all.
    """
    rows = case.bench.rows
    if len(case.exact) < ENOUGH + 2:
        return []
    found = [
        (i, j)
        for i, j in itertools.combinations(case.exact, 2)
        if abs(rows[i].bpw - rows[j].bpw) < _SAME_BPW
        and abs(rows[i].ln_ppl - rows[j].ln_ppl) > _TELLING_LN
    ]
    step = max(1.0, len(found) / _MAX_PAIRS)
    chosen = [found[int(k * step)] for k in range(min(len(found), _MAX_PAIRS))]
    h = without(case.model.id)
    out = []
    for i, j in chosen:
        keep = others(case, i, j)
        truth = rows[i].ln_ppl - rows[j].ln_ppl
        ours = _difference(case, rows, keep, i, j, h)
        size = _difference(case, case.by_size, keep, i, j, h)
        bits = _by_bpw(case, keep, rows[i].bpw) - _by_bpw(case, keep, rows[j].bpw)
        out.append(
            Pair(case.model.id, _right(ours, truth), _right(bits, truth), _right(size, truth))
        )
    return out


def losses(outcomes: Sequence[Outcome]) -> list[str]:
    """Return, one sentence each, where a control has the smaller median error."""
    out = []
    models = sorted({o.model for o in outcomes})
    for name, low, high in scores.BANDS:
        here = [o for o in outcomes if low <= o.bpw < high]
        groups = [("all models", here)] + [(m, [o for o in here if o.model == m]) for m in models]
        for who, rows in groups:
            if len(rows) < ENOUGH:
                continue
            ours = float(np.median([scores.error(o.predicted, o.measured) for o in rows]))
            for control in ("bpw_only", "by_size"):
                theirs = float(
                    np.median([scores.error(getattr(o, control), o.measured) for o in rows])
                )
                if theirs < ours:
                    out.append(
                        f"{who}, {name} bpw, {len(rows)} mixes: median error {ours:.2%}, "
                        f"control {control} {theirs:.2%}"
                    )
    return out


def _controls(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    doc: dict[str, Any] = {}
    for name in ("bpw_only", "by_size"):
        bands = scores.bands(outcomes, lambda o, n=name: getattr(o, n))  # type: ignore[misc]
        for band in bands:
            band.pop("coverage90")
        gain = scores.median_gain(outcomes, lambda o, n=name: getattr(o, n))  # type: ignore[misc]
        doc[name] = {"bands": bands, "gain": gain}
    return doc


def _row(o: Outcome, apart: set[str]) -> dict[str, Any]:
    return {
        "id": f"{o.model}: {o.id}",
        "model": o.model,
        "bpw": o.bpw,
        "predicted": math.exp(o.predicted),
        "low": math.exp(o.low),
        "high": math.exp(min(o.high, 50.0)),
        "measured": math.exp(o.measured),
        "n_known": o.n_known,
        "bpw_only": None if o.bpw_only is None else math.exp(o.bpw_only),
        "by_size": None if o.by_size is None else math.exp(min(o.by_size, 50.0)),
        "shown_apart": o.model in apart,
    }


def _by_bpw(case: cases.Cases, keep: Sequence[int], bpw: float) -> float:
    bench = case.bench
    train = [bench.rows[j] for j in keep if bench.rows[j].exact]
    return controls.bpw_only(train, bpw, bench.ln_base if bench.base_known else None)


def _difference(
    case: cases.Cases, rows: Sequence[Row], keep: Sequence[int], i: int, j: int, h: Hyper
) -> float:
    posterior = _posterior(case, rows, keep, h)
    first = calibrate.predict(posterior, rows[i].w, h).ln_ppl
    return first - calibrate.predict(posterior, rows[j].w, h).ln_ppl


def _right(guess: float, truth: float) -> float:
    return 0.5 if guess == 0.0 else float((guess > 0.0) == (truth > 0.0))


def _posterior(
    case: cases.Cases, rows: Sequence[Row], keep: Sequence[int], h: Hyper
) -> calibrate.Posterior:
    bench, model = case.bench, case.model
    known = calibrate.prior(
        bench.ln_base, bench.ln_base_sd, model.n_elements, prior.scale_law(model), h
    )
    return calibrate.fit([rows[j] for j in keep], known, h)


def _predict(
    case: cases.Cases,
    rows: Sequence[Row],
    keep: Sequence[int],
    i: int,
    h: Hyper,
    *,
    inflate: bool = True,
) -> calibrate.Prediction:
    posterior = _posterior(case, rows, keep, h)
    if not inflate:
        posterior = replace(posterior, inflation=1.0)
    return calibrate.predict(posterior, rows[i].w, h)


def _outcome(case: cases.Cases, i: int, p: calibrate.Prediction, h: Hyper) -> Outcome:
    row, base = case.bench.rows[i], case.bench.ln_base
    low, high = p.interval(h)
    low, centre, high = trust.printed(
        (low - base, p.ln_ppl - base, high - base),
        bpw=row.bpw,
        damage=p.damage,
        n_vocab=case.model.hparams.n_vocab,
        ln_base=base,
    )
    return Outcome(
        row.id, case.model.id, row.bpw, row.ln_ppl, base + centre, base + low, base + high
    )
