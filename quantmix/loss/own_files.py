"""One's own measured files of a model (rows of the store): evidence in place of published rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from quantmix.loss import features, mixes, solved
from quantmix.loss.calibrate import Row, hyper
from quantmix.loss.evidence import BASE_SD, Bench, needs_imatrix
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model
from quantmix.store import Measurement

# Files measured alike replace the published rows from so many mixes on.
_ENOUGH: Final = 3


def bench(model: Model, share: FloatArray, measured: Sequence[Measurement]) -> Bench | None:
    """Return the bench of one's own measurements of `model` (rows of the store), None if too few.

    Rows count that were measured against a base (they have `ln_ratio`) and name their types. Of
    the groups measured alike (text, context, chunks, engine, KV types, base) that have three mixes
    or more the one that tells most (Σ 1/sd²) is used: groups are never mixed, nor with published
    rows. Of a mix measured twice the mean counts. Files made without an importance matrix are left
    out, as published ones are, and so is the base itself.
    """
    groups: dict[tuple[object, ...], list[Measurement]] = {}
    for m in measured:
        if m.ln_ratio is None or not m.types:
            continue
        if m.imatrix == 0:
            w = features.of_types(model, share, _types(model, m), imatrix=False)
            if needs_imatrix(w):
                continue
        alike = (m.corpus, m.n_ctx, m.chunks, m.engine, m.build, m.ctk, m.ctv, m.base)
        groups.setdefault(alike, []).append(m)
    benches = [_of_group(model, share, group) for group in groups.values()]
    row_sd = hyper().row_sd
    return max(
        (b for b in benches if len(b.rows) >= _ENOUGH),
        key=lambda b: sum(1.0 / (row_sd**2 + row.sd**2) for row in b.rows),
        default=None,
    )


def _of_group(model: Model, share: FloatArray, alike: Sequence[Measurement]) -> Bench:
    """Return the bench of own files that were measured alike, a row per mix."""
    ln_base = float(np.mean([np.log(m.ppl) - (m.ln_ratio or 0.0) for m in alike]))
    by_mix: dict[str, list[Measurement]] = {}
    for m in alike:
        by_mix.setdefault(m.mix, []).append(m)
    rows = []
    for same in by_mix.values():
        types = _types(model, same[0])
        tilted = solved.shares(model, share, types, hyper().solved)
        w = features.of_types(model, tilted, types, imatrix=same[0].imatrix != 0)
        ratio = float(np.mean([m.ln_ratio or 0.0 for m in same]))
        # Runs over the same text share its tokens: repeating one tells no more.
        sd = min(m.ln_ratio_err or 0.0 for m in same)
        if w.any():
            rows.append(Row(same[-1].file, w, ln_base + ratio, same[0].bpw, sd=sd))
    return Bench(model.id, ln_base, BASE_SD, True, tuple(rows))


def _types(model: Model, m: Measurement) -> list[str | None]:
    names = (m.types.get(t.name) if t.quantizable and t.loaded else None for t in model.tensors)
    return [mixes.curve_name(n) if n else None for n in names]
