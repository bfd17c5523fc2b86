"""What predictions are checked on: measured mixes that are known by tensor or by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantmix.loss import calibrate, evidence, features, measured_recipes, prior, solved
from quantmix.loss.calibrate import Hyper, Row
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model
from quantmix.models.sources import load_model


@dataclass(frozen=True)
class Cases:
    """One model's measured mixes, twice: with fitted shares and with shares by size.

    Attributes:
        bench: rows (exact mixes and, last, rows of which only the size is known).
        by_size: the same rows with features from parameter counts (a control).
    """

    model: Model
    bench: evidence.Bench
    by_size: tuple[Row, ...]

    @property
    def exact(self) -> list[int]:
        """Positions of the rows whose mix is known and quantizes something."""
        return [i for i, r in enumerate(self.bench.rows) if r.exact and r.w.any()]


def gather(
    published: Sequence[evidence.Published],
    recipes: Path | None = None,
    h: Hyper | None = None,
) -> tuple[list[Cases], list[tuple[str, str]]]:
    """Return the cases by model (catalog order of appearance) and what was skipped, with why.

    Rows known by size only get the damage of a usual mix from `h`, recipes solved by tensor their
    shares; by default from what was fitted without the model.
    """
    found, skipped = measured_recipes.read(recipes) if recipes else ([], [])
    ids = dict.fromkeys([p.model for p in published] + [r.model for r in found])
    out = []
    for model_id in ids:
        model = load_model(model_id)
        rows = evidence.of_model(model, published)
        mine = [r for r in found if r.model == model_id]
        kept, doubled = _without_doubles(rows, mine)
        skipped += doubled
        cases = _cases(model, kept, mine, h)
        skipped += [(f"{model_id}: {label}", why) for label, why in cases.bench.skipped]
        out.append(cases)
    return out, skipped


def _without_doubles(
    rows: Sequence[evidence.Published], recipes: Sequence[measured_recipes.MeasuredRecipe]
) -> tuple[list[evidence.Published], list[tuple[str, str]]]:
    """Drop published rows that are a recipe's own measurement, listed a second time."""
    kept, doubled = [], []
    for row in rows:
        same = any(abs(row.ppl - r.ppl) < 1e-6 and row.label.startswith("recipe") for r in recipes)
        if same:
            doubled.append((f"{row.model}: {row.label}", "the recipe file has it by tensor"))
        else:
            kept.append(row)
    return kept, doubled


def _cases(
    model: Model,
    rows: Sequence[evidence.Published],
    recipes: Sequence[measured_recipes.MeasuredRecipe],
    h: Hyper | None,
) -> Cases:
    h = h or calibrate.hyper(model.id)
    share = prior.shares(model)
    size = size_shares(model)
    bench = evidence.bench(model, share, rows, h=h)
    control = {r.id: r for r in evidence.bench(model, size, rows, h=h).rows}
    mine, mine_by_size, skipped = [], [], list(bench.skipped)
    seen: set[tuple[float, bytes]] = set()
    for r in recipes:
        w = features.of_types(model, solved.shares(model, share, r.types, h.solved), r.types)
        key = (r.ppl, w.tobytes())
        if key in seen:
            skipped.append((r.id, "the same recipe with the same ppl is there already"))
            continue
        seen.add(key)
        y = float(np.log(r.ppl))
        mine.append(Row(r.id, w, y, r.bpw))
        mine_by_size.append(Row(r.id, features.of_types(model, size, r.types), y, r.bpw))
    exact = [r for r in bench.rows if r.exact]
    loose = [r for r in bench.rows if not r.exact]
    all_rows = (*mine, *exact, *loose)
    base, base_sd = bench.ln_base, bench.ln_base_sd
    if not bench.base_known and all_rows:
        base, base_sd = evidence.unknown_base(model, all_rows, h)
    full = evidence.Bench(model.id, base, base_sd, bench.base_known, all_rows, tuple(skipped))
    return Cases(model, full, (*mine_by_size, *(control.get(r.id, r) for r in (*exact, *loose))))


def size_shares(model: Model) -> FloatArray:
    """Return shares by number of weights, the input embedding left out, shape (n_tensors,)."""
    n = np.array(
        [
            t.n_elements if t.quantizable and t.loaded and t.role != "token_embd" else 0
            for t in model.tensors
        ],
        dtype=np.float64,
    )
    return np.asarray(n / n.sum())
