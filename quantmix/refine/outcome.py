"""The recipe that a search ended in, and the document about the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from quantmix.assemble import assemble
from quantmix.emit.flags import offload
from quantmix.loss.quality import Quality
from quantmix.recipe import DeviceUse, Optimality, PlannedTensor, Recipe
from quantmix.refine.frame import Frame
from quantmix.refine.search import Difference, Found, Score, paired
from quantmix.speed.model import predict
from quantmix.speed.prediction import Speed

_QUANTILE: Final = 1.645
# Damage moves with the text, as in `loss.measured`: what was measured here is off by so much there.
_OTHER_TEXT_LN_SD: Final = 0.3
_ANOTHER: Final = (
    "measured with the packaged CPU engine on one text: other text moves the level by tens of "
    "percent, and other hardware rounds activations differently"
)
_UNREAD: Final = (
    "{} as in the recipe: the packaged engine does not read them on a text, so the KLD tells "
    "nothing of them"
)
_SPEED: Final = (
    "the speed was not predicted again, as the recipe tells nothing of its machine: bytes on every "
    "device are as before, types not"
)
_SPEED_MOVED: Final = 0.01  # shares below are not worth a note


def refined_recipe(
    recipe: Recipe, frame: Frame, found: Found, name: str, conditions: Mapping[str, Any], n_ctx: int
) -> Recipe:
    """Return the recipe of `found.choice`, with the quality measured on the held-out chunks.

    Raises:
        CheckFailed, UsageError: no flags put the new sizes where the recipe had them.
    """
    assert found.before is not None
    assert found.after is not None
    tensors = _tensors(recipe, frame, found)
    swaps = swaps_of(recipe, tensors)
    devices = _devices(recipe, frame, found)
    flags = None
    speed = Speed()
    if frame.placement is not None and frame.rig is not None:
        sizes = {t.name: t.bytes for t in tensors}
        flags = offload(frame.model, recipe.settings, frame.rig, frame.placement, sizes)
        mix = frame.choices.palette.mix(frame.choices.mix(found.choice)[0])
        speed = predict(frame.model, recipe.settings, frame.rig, frame.placement, mix)
    lost = recipe.speed.tg_tps is not None and speed.tg_tps is None
    notes = (*held_note(frame), *((_SPEED,) if lost else ()))
    total = float(sum(t.damage for t in tensors))
    made = assemble(
        frame.model,
        recipe.settings,
        tensors,
        name=name,
        budget=recipe.budget,
        devices=devices,
        quality=replace(_quality(found.after, notes), damage=total),
        optimality=Optimality(
            status="feasible",
            objective=total,
            lower_bound=0.0,
            gap=1.0 if total else 0.0,
            constraints=(*recipe.optimality.constraints, f"bytes everywhere as in {recipe.name}"),
            holds_for="nothing: measured, not proven",
        ),
        speed=speed,
        flags=flags,
        imatrix=recipe.with_imatrix,
    )
    return replace(made, refined=_refined(recipe, found, len(swaps), conditions, n_ctx))


def held_note(frame: Frame) -> tuple[str, ...]:
    """Return a note on loaded matrices that no score tells of, none when there are none."""
    roles = dict.fromkeys(
        t.role for t in frame.model.tensors if t.name in frame.held and t.quantizable and t.loaded
    )
    return (_UNREAD.format(", ".join(roles)),) if roles else ()


def speed_note(before: Speed, after: Speed) -> tuple[str, ...]:
    """Return a note on a predicted speed that moved, none where it is unknown or much the same."""
    if before.tg_tps is None or after.tg_tps is None:
        return ()
    if abs(after.tg_tps / before.tg_tps - 1.0) < _SPEED_MOVED:
        return ()
    return (f"predicted generation {after.tg_tps:.1f} tokens/s, before {before.tg_tps:.1f}",)


def swaps_of(recipe: Recipe, tensors: tuple[PlannedTensor, ...]) -> list[dict[str, str]]:
    """Return what differs from `recipe`: tensor, from, to."""
    before = {t.name: t.type for t in recipe.tensors}
    return [
        {"tensor": t.name, "from": before[t.name], "to": t.type}
        for t in tensors
        if before[t.name] != t.type
    ]


def _tensors(recipe: Recipe, frame: Frame, found: Found) -> tuple[PlannedTensor, ...]:
    """Return the planned tensors; the measured KLD is shared out as the loss model says."""
    columns, _ = frame.choices.mix(found.choice)
    palette = frame.choices.palette
    rows = np.arange(len(columns))
    free = columns >= 0
    share = np.where(free, palette.damage[rows, np.maximum(columns, 0)], 0.0)
    assert found.after is not None
    share *= found.after.mean / share.sum() if share.sum() > 0.0 else 0.0
    planned = {t.name: t for t in recipe.tensors}
    return tuple(
        replace(
            planned[t.name],
            type=palette.types[columns[i]].name if free[i] else planned[t.name].type,
            bytes=int(palette.bytes[i, columns[i]]) if free[i] else planned[t.name].bytes,
            damage=float(share[i]),
        )
        for i, t in enumerate(frame.model.tensors)
    )


def _devices(recipe: Recipe, frame: Frame, found: Found) -> tuple[DeviceUse, ...]:
    """Return what every device holds now; buffers are those of the recipe, as upper bounds."""
    rows = np.arange(len(found.choice))
    used = frame.use[:, rows, found.choice].sum(axis=1)
    uses = []
    for device, n_bytes, most in zip(recipe.devices, used, frame.capacity, strict=False):
        assert n_bytes <= most, f"{device.name} would hold more than the recipe puts there"
        more = device.weights_bytes - int(n_bytes)
        free = None if device.free_bytes is None else device.free_bytes + more
        uses.append(replace(device, weights_bytes=int(n_bytes), free_bytes=free))
    return tuple(uses)


def _quality(after: Score, notes: tuple[str, ...]) -> Quality:
    """Return the quality measured on the held-out chunks, with an interval for other text."""
    rise = paired(after.ln_ratio, [0.0] * len(after.ln_ratio))
    reach = _QUANTILE * math.hypot(rise.err, _OTHER_TEXT_LN_SD * rise.mean)
    base = math.exp(float(np.mean(after.base_nll)))
    low, high = rise.mean - reach, rise.mean + reach
    return Quality(
        damage=0.0,
        ln_ppl_ratio=rise.mean,
        ppl=base * math.exp(rise.mean),
        ppl_low=base * math.exp(low),
        ppl_high=base * math.exp(high),
        ppl_base=base,
        basis="measured",
        warnings=(_ANOTHER, *notes),
        ln_ppl_ratio_low=low,
        ln_ppl_ratio_high=high,
    )


def _refined(
    recipe: Recipe, found: Found, n_swaps: int, conditions: Mapping[str, Any], n_ctx: int
) -> dict[str, Any]:
    """Return the `refined` object of recipe.json."""
    doc = judged(found)
    assert doc is not None
    return {
        "from": recipe.name,
        "swaps": n_swaps,
        **doc,
        "n_ctx": n_ctx,
        "corpus": conditions["corpus"],
        "engine": conditions["engine"],
    }


def judged(found: Found) -> dict[str, Any] | None:
    """Return the KLD on the held-out chunks before and after, None when nothing was judged."""
    if found.before is None or found.after is None or found.difference is None:
        return None
    own = paired(found.after.by_chunk, [0.0] * len(found.after.by_chunk))
    return {
        "kld": own.mean,
        "kld_err": own.err,
        "kld_before": found.before.mean,
        "difference": found.difference.mean,
        "difference_err": found.difference.err,
        "chunks": len(found.after.by_chunk),
    }


def rounds_json(found: Found) -> list[dict[str, Any]]:
    """Return the rounds of a search as plain JSON values."""
    rows = []
    for r in found.rounds:
        probes = [
            {
                "role": r.parts[p.part].role,
                "layers": list(r.parts[p.part].layers),
                "step": p.way,
                "predicted": p.predicted,
                "change": p.change,
                "change_err": p.err,
            }
            for p in r.probes
        ]
        mixes = [
            {"expected": e, "measured": None if m is None else _plain(m)}
            for e, m in zip(r.expected, r.measured, strict=True)
        ]
        rows.append({"probes": probes, "mixes": mixes, "chosen": r.chosen, "gap": r.gap})
    return rows


def _plain(d: Difference) -> dict[str, float]:
    return asdict(d)
