"""Predicted KLD on another text than the probes', from one anchor mix measured there.

Damage moves with the text: a text the model knows by heart loses half as much again as a novel,
in every mix alike. So the level of a text is measured once, on a mix that is *not* the one to be
predicted: every tensor at the probed type nearest in damage to its own, and quantized otherwise.

    KLD(mix, text) = KLD_probes(mix) · KLD(anchor, text) / KLD_probes(anchor)

a ratio estimate: what the probes say of both mixes, times what the text does to the anchor. The
anchor is set by hot swap in the loaded base: one pass over the text, no quantized file, and the
base's log-probabilities on disk to compare with.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantmix import measurements
from quantmix.engine import child
from quantmix.engine.child import Emit
from quantmix.errors import BadFile, EngineError, UsageError
from quantmix.ggml.types import GgmlType, get
from quantmix.ggml.weights import open_weights
from quantmix.loss import curve
from quantmix.loss.measured import MeasuredModel
from quantmix.loss.model import FloatArray, mix_damage
from quantmix.measurements import Measurements
from quantmix.models.model import Model
from quantmix.models.sources import load_model

# Spread of ln(predicted / measured KLD) where anchor and mix have about the same damage: nine files
# and texts in docs/measuring.md, 0.95 to 1.04. Per unit of ln(damage of mix / of anchor): a text
# hits low and high bits differently (uniform iq3_ks, iq4_ks, q5_K on `test.txt`: 1.27, 1.46, 1.46
# times the probes': 0.09, rounded up). And per unit that types lie beyond all that was probed:
# uniform q8_0, q6_K and iq2_xxs from probes at three and four bits on a small random model (0.15
# to 0.5; tests/test_anchor.py).
_LN_SD, _LN_SD_APART, _LN_SD_BEYOND = 0.05, 0.12, 0.35
# Tensors without an anchor may take so much of the mix's damage.
_MAY_BE_OPEN: Final = 0.1
_QUANTILE: Final = 1.645
_TINY: Final = 1e-12


@dataclass(frozen=True, slots=True)
class AnchoredKld:
    """Mean KLD of a mix as predicted for one text, nats.

    Attributes:
        kld, kld_low, kld_high: on this text, 90 % interval, the wider the farther the probed types
            are from those of the mix.
        probes_kld: on the text of the probes.
        text_factor: what this text does to the anchor; `kld = probes_kld · text_factor`.
        anchor_kld, anchor_err: measured here on the anchor mix, whose types are others.
        seconds, forward_seconds: of the anchor; the latter inside the engine's decode calls.
    """

    kld: float
    kld_low: float
    kld_high: float
    probes_kld: float
    text_factor: float
    anchor_kld: float
    anchor_err: float
    seconds: float
    forward_seconds: float


@dataclass(frozen=True, slots=True)
class Probed:
    """What was measured on a base model, and with which files; `open_probed` makes it."""

    base: Path
    imatrix: Path | None
    measured: Measurements


def open_probed(base: Path, file: Path, imatrix: Path | None) -> Probed:
    """Read a results file of `measure`, sure to be of `base` and `imatrix`.

    Raises:
        BadFile: missing, malformed, or of another model or imatrix.
        UsageError: measured with an imatrix and none is given, or the other way round.
    """
    measured = measurements.load(file)
    weights = open_weights(base)
    if (measured.model, measured.base) != (weights.model_fingerprint, weights.data_fingerprint):
        raise BadFile(f"{file} was not measured on {base}: give the --base it was measured on")
    if bool(imatrix) != bool(measured.imatrix):
        how = "with an imatrix: give it by --imatrix" if measured.imatrix else "without --imatrix"
        raise UsageError(f"{file} was measured {how}")
    if imatrix and _sha256(imatrix) != measured.imatrix:
        raise BadFile(f"{file} was measured with another imatrix than {imatrix}")
    return Probed(base, imatrix, measured)


@dataclass(frozen=True, slots=True)
class Plan:
    """An anchor for one mix, and what the probes say of both (nats, on their own text).

    Attributes:
        types: tensor → type of the anchor.
        anchor_kld, mix_kld: of the anchor, and of the mix to be predicted.
        apart: |ln| of the damage of the mix over that of the anchor, the larger of the whole and
            of the mean over tensors.
        beyond: how far in ln damage types lie outside what was probed on their role, mean over
            tensors.
    """

    probed: Probed
    types: dict[str, str]
    anchor_kld: float
    mix_kld: float
    apart: float
    beyond: float


def plan(probed: Probed, types: Mapping[str, str]) -> Plan:
    """Choose the anchor for the mix `types` (tensor → type).

    Raises:
        UnknownName: the mix has a type that the packaged engine does not know.
        UsageError: nothing is quantized; the probes leave out what matters in this mix, know it at
            one type only, or show no damage; or they were made around a quantized mix.
    """
    model = load_model(str(probed.base))
    loss = MeasuredModel.of(model, probed.measured, imatrix=probed.imatrix is not None)
    mix = [_type(types.get(t.name)) if t.quantizable else None for t in model.tensors]
    if not any(mix):
        raise UsageError("nothing in the file is quantized: there is no KLD to predict")
    other, beyond = anchor_mix(model, loss, probed.measured, mix)
    own, theirs = (mix_damage(loss, model, m) for m in (mix, other))
    covered = np.array([q is not None for q in other])
    _require_cover(model, own, covered)
    here, there = loss.kld(float(own.sum())), loss.kld(float(theirs.sum()))
    if min(here, there) <= 10.0 * probed.measured.noise_floor:
        raise UsageError("the probes show no damage above their noise: measure at lower types")
    each = np.abs(np.log(np.maximum(own, _TINY) / np.maximum(theirs, _TINY)))
    weight = own * covered / own[covered].sum()
    apart = max(float((each * weight).sum()), abs(math.log(here / there)))
    names = {t.name: q.name for t, q in zip(model.tensors, other, strict=True) if q}
    return Plan(probed, names, there, here, apart, float((beyond * weight).sum()))


def _require_cover(model: Model, damage: FloatArray, covered: NDArray[np.bool_]) -> None:
    """Raise UsageError where tensors without an anchor hold too much of the damage."""
    share = float(damage[~covered].sum() / damage.sum()) if damage.sum() > 0.0 else 1.0
    if share > _MAY_BE_OPEN:
        left = [(t, d) for t, d, c in zip(model.tensors, damage, covered, strict=True) if not c]
        roles = sorted({t.role for t, d in left if d > 0.0})
        raise UsageError(
            f"{share:.0%} of the damage of this mix is in roles that were not measured at two "
            f"types or more, {', '.join(roles[:4])}: measure them too"
        )


def predict(
    planned: Plan,
    corpus: Path,
    logits_base: Path,
    *,
    chunks: int,
    n_ctx: int = 512,
    threads: int | None = None,
    on_event: Emit | None = None,
) -> AnchoredKld:
    """Predict the KLD on `corpus` of the mix that `planned` is for: one pass with its anchor.

    Args:
        logits_base: the base's log-probabilities on `corpus`, at least `chunks` chunks.

    Raises:
        BadFile: `logits_base` is of another text, model or engine.
        EngineError: the engine failed, or the anchor does nothing.
    """
    probed = planned.probed
    request = {
        "source": str(probed.base),
        "corpus": str(corpus),
        "imatrix": str(probed.imatrix) if probed.imatrix else None,
        "logits_base": str(logits_base),
        "mix": planned.types,
        "n_ctx": n_ctx,
        "chunks": chunks,
        "threads": threads,
    }
    found: dict[str, Any] = child.run("quantmix.engine.probing:mix_task", request, on_event)
    if found["kld"] <= 10.0 * probed.measured.noise_floor:
        raise EngineError(f"the anchor mix shows a KLD of {found['kld']:.1e} only: it is noise")
    factor = found["kld"] / planned.anchor_kld
    value = planned.mix_kld * factor
    apart, beyond = _LN_SD_APART * planned.apart, _LN_SD_BEYOND * planned.beyond
    sd = math.hypot(_LN_SD, apart, beyond, found["kld_err"] / found["kld"])
    reach = math.exp(_QUANTILE * sd)
    return AnchoredKld(
        kld=value,
        kld_low=value / reach,
        kld_high=value * reach,
        probes_kld=planned.mix_kld,
        text_factor=factor,
        anchor_kld=found["kld"],
        anchor_err=found["kld_err"],
        seconds=found["seconds"],
        forward_seconds=found["forward_seconds"],
    )


def anchor_mix(
    model: Model, loss: MeasuredModel, measured: Measurements, mix: list[GgmlType | None]
) -> tuple[list[GgmlType | None], FloatArray]:
    """Return per tensor the probed type nearest in damage to its own, and quantized otherwise.

    Nearest in ln damage; an interleaved type counts as its base. None where the tensor is kept or
    not loaded, or nothing else was probed on its role. Second, per tensor how far in ln damage its
    own type lies outside all that was probed on its role, shape (n_tensors,).

    Raises:
        UsageError: that leaves nothing.
    """
    probed: dict[str, set[str]] = defaultdict(set)
    for p in measured.probes:
        if p.scope == "role" and not p.layers and not p.fallbacks:
            probed[p.role].add(p.type)
    if not probed:
        raise UsageError("an anchor needs probes of whole roles: measure --by role")
    names = sorted(set().union(*probed.values()))
    own = [q for q in mix if q is not None]
    kinds = list({q.name: q for q in (*map(get, names), *own)}.values())
    column = {q.name: j for j, q in enumerate(kinds)}
    cells = np.log(np.maximum(loss.damage(model, kinds), _TINY))
    out: list[GgmlType | None] = []
    beyond = np.zeros(len(mix))
    for i, (tensor, qtype) in enumerate(zip(model.tensors, mix, strict=True)):
        choice = _others(probed[tensor.role], qtype) if tensor.loaded else []
        if qtype is None or not choice:
            out.append(None)
            continue
        wanted = cells[i, column[qtype.name]]
        known = cells[i, [column[n] for n in probed[tensor.role]]]
        beyond[i] = max(float(known.min() - wanted), float(wanted - known.max()), 0.0)
        out.append(get(min(choice, key=lambda n: abs(float(cells[i, column[n]] - wanted)))))
    if not any(out):
        raise UsageError("an anchor needs a second type: measure every role at two types or more")
    return out, beyond


def _others(names: set[str], qtype: GgmlType | None) -> list[str]:
    """Return the types of `names` whose quantization is not that of `qtype`."""
    if qtype is None:
        return []
    own = curve.weights_name(qtype)
    return sorted(n for n in names if curve.weights_name(get(n)) != own)


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as err:
        raise BadFile(f"{path} cannot be read: {err.strerror}") from err


def _type(name: str | None) -> GgmlType | None:
    """Return a type by name, None for floats and what is not there."""
    found = get(name) if name else None
    return found if found is not None and found.is_quantized else None
