"""Predicted KLD on another text than the probes', from one anchor mix measured there.

Damage moves with the text: a text the model knows by heart loses half as much again as a novel,
in every mix alike. So the level of a text is measured once, on a mix that is *not* the one to be
predicted: every tensor at the probed type nearest in damage to its own, and different from it.

    KLD(mix, text) = KLD_probes(mix) · KLD(anchor, text) / KLD_probes(anchor)

a ratio estimate: what the probes say of both mixes, times what the text does to the anchor. The
anchor is set by hot swap in the loaded base, so it costs one pass over the text and no file.
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

from quantmix import measurements
from quantmix.engine import child
from quantmix.engine.child import Emit
from quantmix.engine.weights import open_weights
from quantmix.errors import BadFile, UsageError
from quantmix.ggml.types import GgmlType, get
from quantmix.loss.measured import MeasuredModel
from quantmix.loss.predictor import mix_damage
from quantmix.measurements import Measurements
from quantmix.models.model import Model
from quantmix.models.sources import load_model

# Spread of ln(predicted / measured KLD) with an anchor; see docs/measuring.md.
_LN_SD: Final = 0.05
_QUANTILE: Final = 1.645


@dataclass(frozen=True, slots=True)
class AnchoredKld:
    """Mean KLD of a mix as predicted for one text, nats.

    Attributes:
        kld, kld_low, kld_high: on this text, 90 % interval.
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
    if imatrix and hashlib.sha256(imatrix.read_bytes()).hexdigest() != measured.imatrix:
        raise BadFile(f"{file} was measured with another imatrix than {imatrix}")
    return Probed(base, imatrix, measured)


@dataclass(frozen=True, slots=True)
class Plan:
    """An anchor for one mix, and what the probes say of both (nats, on their own text)."""

    probed: Probed
    mix: dict[str, str]
    anchor_kld: float
    anchored_kld: float


def plan(probed: Probed, types: Mapping[str, str]) -> Plan:
    """Choose the anchor for the mix `types` (tensor → type).

    Raises:
        UsageError: no tensor of the mix has a probed type other than its own.
    """
    model = load_model(str(probed.base))
    loss = MeasuredModel.of(model, probed.measured, imatrix=probed.imatrix is not None)
    mix = [_type(types.get(t.name)) if t.quantizable else None for t in model.tensors]
    other = anchor_mix(model, loss, probed.measured, mix)
    anchored, anchor = (loss.kld(float(mix_damage(loss, model, m).sum())) for m in (mix, other))
    names = {t.name: q.name for t, q in zip(model.tensors, other, strict=True) if q}
    return Plan(probed, names, anchor, anchored)


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
        EngineError: the engine failed.
    """
    probed = planned.probed
    request = {
        "source": str(probed.base),
        "corpus": str(corpus),
        "imatrix": str(probed.imatrix) if probed.imatrix else None,
        "logits_base": str(logits_base),
        "mix": planned.mix,
        "n_ctx": n_ctx,
        "chunks": chunks,
        "threads": threads,
    }
    found: dict[str, Any] = child.run("quantmix.engine.probing:mix_task", request, on_event)
    factor = found["kld"] / planned.anchor_kld
    value = planned.anchored_kld * factor
    reach = math.exp(_QUANTILE * math.hypot(_LN_SD, found["kld_err"] / found["kld"]))
    return AnchoredKld(
        kld=value,
        kld_low=value / reach,
        kld_high=value * reach,
        probes_kld=planned.anchored_kld,
        text_factor=factor,
        anchor_kld=found["kld"],
        anchor_err=found["kld_err"],
        seconds=found["seconds"],
        forward_seconds=found["forward_seconds"],
    )


def anchor_mix(
    model: Model, loss: MeasuredModel, measured: Measurements, mix: list[GgmlType | None]
) -> list[GgmlType | None]:
    """Return per tensor the probed type nearest in damage to its own, and not its own.

    Nearest in ln damage; None where the tensor is kept, or nothing else was probed on its role.

    Raises:
        UsageError: that leaves nothing.
    """
    probed: dict[str, set[str]] = defaultdict(set)
    for p in measured.probes:
        if p.scope == "role" and not p.fallbacks:
            probed[p.role].add(p.type)
    names = sorted(set().union(*probed.values()))
    own = [q for q in mix if q is not None]
    kinds = list({q.name: q for q in (*map(get, names), *own)}.values())
    column = {q.name: j for j, q in enumerate(kinds)}
    cells = np.log(np.maximum(loss.damage(model, kinds), 1e-12))
    out: list[GgmlType | None] = []
    for i, (tensor, qtype) in enumerate(zip(model.tensors, mix, strict=True)):
        choice = sorted(probed[tensor.role] - {qtype.name}) if qtype is not None else []
        if qtype is None or not qtype.is_quantized or not choice:
            out.append(None)
            continue
        wanted = cells[i, column[qtype.name]]
        out.append(get(min(choice, key=lambda n: abs(float(cells[i, column[n]] - wanted)))))
    if not any(out):
        raise UsageError("an anchor needs a second type: measure every role at two types or more")
    return out


def _type(name: str | None) -> GgmlType | None:
    """Return a type by name, None for floats and what is not there."""
    found = get(name) if name else None
    return found if found is not None and found.is_quantized else None
