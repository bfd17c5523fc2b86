"""Measured mixes of a model: the published ones of the package, and any CSV of the same columns.

Rows are comparable only within a bench: one model as published, one corpus, one context length,
one base perplexity. `published.csv` holds what its authors measured, row by row with the source;
`quantmix.loss.fit` makes it from a larger table of measurements.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from quantmix.errors import BadFile, QuantmixError, UsageError
from quantmix.ggml.types import ENGINES, table
from quantmix.loss import features, mixes, prior, response, shipped
from quantmix.loss.calibrate import Hyper, Row, hyper, ln_scale_prior
from quantmix.loss.model import FloatArray
from quantmix.models.catalog import find
from quantmix.models.model import Model

# The catalog knows these by geometry only: what was measured is another model's weights.
_OTHER_WEIGHTS: Final = frozenset({"LLaMA-3.1-8B", "gemma-3-27b-it"})
CORPUS = "wiki.test.raw"
N_CTX = 512
# A base that its author measured at q8_0 instead of bf16, or another build: ln units.
BASE_SD = 0.0005
_NO_IMATRIX: Final = "made without an importance matrix, whose lack costs each model differently"
# Perplexities are published to four decimals.
_SAME_LN: Final = 1e-6
# A base that nobody published is read off one measured mix: what the prior says that it lost is
# off by more than the scale is (types, size), and runs differ.
_UNKNOWN_FORM_SD, _UNKNOWN_BASE_SD = 0.3, 0.003
# A measured base this far (ln) from the one that is used is of another text or build.
OTHER_BASE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Published:
    """One published measurement; `mix` is empty when only the size is known.

    `imatrix` is False where the author used none; unknown counts as used.
    """

    model: str
    label: str
    ppl: float
    bpw: float | None
    size_gib: float | None
    base_ppl: float | None
    corpus: str
    n_ctx: int
    mix: str
    source: str
    imatrix: bool = True


@dataclass(frozen=True)
class Bench:
    """Comparable rows of one model, with its base.

    Attributes:
        ln_base, ln_base_sd: ln PPL of the unquantized model and how sure it is.
        base_known: whether the base was measured (else `unknown_base`).
        rows: what was measured.
        skipped: (label, why) of rows that cannot be used.
    """

    model: str
    ln_base: float
    ln_base_sd: float
    base_known: bool
    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...] = ()


@cache
def published() -> tuple[Published, ...]:
    """Return the published measurements of the package."""
    return tuple(parse_rows(shipped.rows("published.csv")))


def read_csv(file: Path) -> list[Published]:
    """Return the rows of a CSV of measurements; models get their catalog id where they have one.

    Raises:
        BadFile: it cannot be read, lacks a column, or a number in it is none.
    """
    raw = raw_rows(file)
    try:
        rows = parse_rows(raw)
    except UsageError as err:
        raise BadFile(f"{file}: {err}") from err
    return [replace(r, model=catalog_id(r.model) or r.model) for r in rows]


def raw_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV of measurements as they are (columns as in docs/loss-model.md).

    Raises:
        BadFile: it cannot be read, or lacks a column.
    """
    try:
        with file.open(encoding="utf-8", newline="") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise BadFile(f"{file} cannot be read as a CSV of measurements: {err}") from err
    needed = {"model", "label", "ppl", "corpus", "n_ctx"}
    if not rows or not needed <= set(rows[0]):
        raise BadFile(f"{file} lacks measurement columns: it needs {', '.join(sorted(needed))}")
    return rows


def catalog_id(name: str) -> str | None:
    """Return the catalog id of a published model name, None when it is another model."""
    if name in _OTHER_WEIGHTS:
        return None
    try:
        return find(name).id
    except QuantmixError:
        return None


def parse_rows(rows: Iterable[Mapping[str, str]]) -> list[Published]:
    """Read measurement rows (CSV columns as in docs/loss-model.md).

    Raises:
        UsageError: a number is not a positive number, or the perplexity is missing.
    """
    out = []
    for r in rows:
        ppl = _number(r, "ppl")
        if ppl is None or ppl <= 1.0:
            raise UsageError(f"measurement {r.get('label')!r} of {r.get('model')!r} has no ppl")
        out.append(
            Published(
                model=r["model"] or "",
                label=r["label"] or "",
                ppl=ppl,
                bpw=_number(r, "bpw"),
                size_gib=_number(r, "size_gib"),
                base_ppl=_number(r, "base_ppl_bf16_or_q8"),
                corpus=r["corpus"] or "",
                n_ctx=int(_number(r, "n_ctx") or 0),
                mix=r.get("mix") or "",
                source=r.get("source") or "",
                imatrix=(r.get("imatrix") or "").strip().casefold() != "no",
            )
        )
    return out


def _number(row: Mapping[str, str], key: str) -> float | None:
    text = row.get(key) or ""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0.0):
        raise UsageError(f"{key} {text!r} of {row.get('label')!r} is not a positive number")
    return value


def base_ppl(model_id: str) -> float | None:
    """Return the perplexity of an unquantized model on wiki.test.raw at 512, None if unknown."""
    return _bases().get(model_id)


@cache
def _bases() -> dict[str, float]:
    return {r["model"]: float(r["ppl"]) for r in shipped.rows("base_ppl.csv")}


def of_model(model: Model, measured: Sequence[Published] | None = None) -> list[Published]:
    """Return the rows of `model` on the common bench (wiki.test.raw, context 512)."""
    rows = published() if measured is None else measured
    return [r for r in rows if r.model == model.id and r.corpus == CORPUS and r.n_ctx == N_CTX]


def nearest(model: Model, tensor_bytes: int, n: int = 3) -> list[tuple[Published, float]]:
    """Return the n published mixes nearest in size, each with its bits per weight, largest first.

    For a design to be compared with: label, perplexity and source are the publisher's.
    """
    wanted = 8 * tensor_bytes / model.n_elements
    sized = [(r, b) for r in of_model(model) if (b := _bits(model, r)) is not None]
    near = sorted(sized, key=lambda x: (abs(x[1] - wanted), x[0].ppl))[:n]
    return sorted(near, key=lambda x: (-x[1], x[0].ppl))


def _bits(model: Model, p: Published) -> float | None:
    if p.bpw:
        return p.bpw
    if p.size_gib:
        return p.size_gib * 8 * 2**30 / model.n_elements
    return None


def bench(
    model: Model,
    share: FloatArray,
    measured: Sequence[Published],
    *,
    sizes_too: bool = True,
    h: Hyper | None = None,
) -> Bench:
    """Return the comparable rows of `measured` with their features.

    Rows without a mix enter as a typical mix of their size when `sizes_too` and the model is
    sparse: on dense ones (embeddings of every size, presets of every kind) size says too little,
    and so it does where one type costs nothing because experts were trained in it.
    """
    h = h or hyper()
    sizes_too = sizes_too and model.hparams.is_moe and not any(t.exact_type for t in model.tensors)
    bases = sorted({p.base_ppl for p in measured if p.base_ppl})
    known = base_ppl(model.id) or (bases[0] if bases else None)
    rows, skipped = [], []
    seen: set[tuple[float, bytes]] = set()
    for p in measured:
        row, why = _row(model, share, p, sizes_too, h, known)
        if row is None:
            skipped.append((p.label, why))
            continue
        if known is not None and _is_base(row, known):
            skipped.append((p.label, "it is the base that others are compared with"))
            continue
        key = (round(row.ln_ppl, 6), row.w.tobytes())
        if key in seen:
            skipped.append((p.label, "the same measurement is there already"))
            continue
        seen.add(key)
        rows.append(row)
    if known is not None:
        return Bench(model.id, float(np.log(known)), BASE_SD, True, tuple(rows), tuple(skipped))
    if not rows:
        # Nothing is measured against it: only the ratio is predicted, and a base cancels there.
        return Bench(model.id, 0.0, BASE_SD, False, (), tuple(skipped))
    ln_base, sd = unknown_base(model, rows, h)
    return Bench(model.id, ln_base, sd, False, tuple(rows), tuple(skipped))


def unknown_base(model: Model, rows: Sequence[Row], h: Hyper) -> tuple[float, float]:
    """Return ln PPL of an unmeasured base and its standard deviation.

    From the row that tells most: measured, less what the prior says that its mix lost.
    """
    scale, scale_sd = ln_scale_prior(model.n_elements, prior.scale_law(model), h)
    theta = np.zeros(response.n_parameters())
    theta[response.SCALE], theta[response.ONSET] = scale, h.ln_onset
    rises = response.respond(theta, np.array([r.w for r in rows]), h.power).rise
    told = []
    for row, rise in zip(rows, rises, strict=True):
        off = math.hypot(scale_sd, _UNKNOWN_FORM_SD, 0.0 if row.exact else h.unknown_mix)
        told.append((math.hypot(_UNKNOWN_BASE_SD, off * float(rise)), row.ln_ppl - float(rise)))
    sd, ln_base = min(told)
    return ln_base, sd


def _is_base(row: Row, base: float) -> bool:
    """Whether the base perplexity *is* this file's: floats or q8_0 throughout, to four decimals.

    Its rise of exactly nothing is no measurement.
    """
    lossy = np.delete(row.w, features.columns()["q8_0"], axis=1).any()
    return row.exact and not lossy and abs(row.ln_ppl - float(np.log(base))) < _SAME_LN


def _row(
    model: Model, share: FloatArray, p: Published, sizes_too: bool, h: Hyper, base: float | None
) -> tuple[Row | None, str]:
    bpw = _bits(model, p)
    # Measured next to another run of the base: what counts is the ratio.
    moved = 0.0 if p.base_ppl is None or base is None else math.log(base / p.base_ppl)
    if abs(moved) > OTHER_BASE:
        return None, f"compared with a base of {p.base_ppl:g} where others have {base:g}"
    ln_ppl = math.log(p.ppl) + moved
    if p.mix:
        try:
            chances = mixes.resolve(model, p.mix, prior.shares(model))
        except QuantmixError as err:
            if not sizes_too:
                return None, str(err)
        else:
            w = features.of_fractions(model, share, chances)
            if not p.imatrix and needs_imatrix(w):
                return None, _NO_IMATRIX
            return Row(p.label, w, ln_ppl, bits_of(model, chances)), ""
    if not sizes_too:
        return None, "its mix is not published"
    if not p.imatrix:
        return None, _NO_IMATRIX
    if bpw is None:
        return None, "neither its mix nor its size is published"
    return Row(p.label, typical(bpw, h), ln_ppl, bpw, exact=False), ""


def needs_imatrix(w: FloatArray) -> bool:
    """Whether some type of a mix, features `w`, would do less damage with an importance matrix."""
    return bool((w.sum(axis=0) * (features.without_imatrix() - 1.0)).any())


def typical(bpw: float, h: Hyper) -> FloatArray:
    """Return features with the damage of a usual mix of `bpw` (ln damage: fitted polynomial)."""
    w = np.zeros((features.N_GROUPS, len(features.columns())))
    bits = min(max(bpw, 1.5), 9.0)
    damage = float(np.exp(np.polynomial.polynomial.polyval(np.log(bits / 4.0), h.size_curve)))
    w[2:5, features.columns()["iq4_k"]] = damage / 3.0
    return w


def bits_of(model: Model, chances: Sequence[Mapping[str, float] | None]) -> float:
    """Return the expected bits per weight of a mix known by class, MTP blocks left out."""
    sizes = {n: t.bpw for e in ENGINES for n, t in table(e).items()}
    total, weights = 0.0, 0
    for tensor, chance in zip(model.tensors, chances, strict=True):
        if chance is not None:
            total += tensor.n_elements * sum(sizes[q] * p for q, p in chance.items())
        elif tensor.loaded:
            total += 32.0 * tensor.n_elements
        weights += tensor.n_elements if tensor.loaded else 0
    return total / weights
