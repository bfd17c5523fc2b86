"""The trust region: where predictions are known to fail, and what to say there.

Additive damage predicts well while the total is below about 0.3 nats and few tensors are at two
bits; below 2.3 bpw mixes of one size differ by tens of percent. There the upper end of the
interval widens and a warning names the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

from quantmix.ggml.types import ENGINES, GgmlType, table
from quantmix.loss import curve, prior
from quantmix.loss.features import lossless
from quantmix.models.model import Model, Tensor

LOW_BPW: Final = 2.3
HIGH_DAMAGE: Final = 0.3
_TWO_BITS: Final = 2.5
_MANY_TWO_BITS: Final = 0.6
_EXTRAPOLATED: Final = 0.001
_HEAD_BITS: Final = 4.0


class _Knows(Protocol):
    @property
    def basis(self) -> str: ...
    @property
    def imatrix(self) -> bool: ...


def weights_bpw(model: Model, mix: Sequence[GgmlType | None]) -> float:
    """Return the bits per weight over the matrices, the input embedding left out.

    Kept ones count with 16 bits, or with those of the type that they were trained in.
    """
    bits, weights = 0.0, 0
    for tensor, qtype in zip(model.tensors, mix, strict=True):
        if tensor.quantizable and tensor.loaded and tensor.role != "token_embd":
            bits += _bpw(tensor, qtype) * tensor.n_elements
            weights += tensor.n_elements
    return bits / weights if weights else 16.0


def two_bit_share(model: Model, mix: Sequence[GgmlType | None]) -> float:
    """Return the share of the weights that lie at 2.5 bits or less."""
    low = total = 0
    for tensor, qtype in zip(model.tensors, mix, strict=True):
        if tensor.quantizable and tensor.loaded:
            total += tensor.n_elements
            low += tensor.n_elements if _bpw(tensor, qtype) <= _TWO_BITS else 0
    return low / total if total else 0.0


def _bpw(tensor: Tensor, qtype: GgmlType | None) -> float:
    if qtype is not None:
        return qtype.bpw
    for engine in ENGINES:
        kept = table(engine).get(tensor.source_type)
        if kept is not None:
            return min(kept.bpw, 16.0)
    return 16.0


def printed(
    rises: tuple[float, float, float], *, bpw: float, damage: float, n_vocab: int, ln_base: float
) -> tuple[float, float, float]:
    """Return low, centre and high of ln(PPL/base) as they are printed.

    Outside the trust region the upper half is wider; nothing is worse than guessing among all
    tokens. `bpw` is `weights_bpw`, `damage` in nats, `ln_base` the ln PPL unquantized.
    """
    low, rise, high = rises
    high = rise + (high - rise) * widening(bpw, damage)
    worst = max(math.log(max(n_vocab, 2)) - ln_base, 0.0)
    return min(low, worst), min(rise, worst), min(high, worst)


def widening(bpw: float, damage: float) -> float:
    """Return the factor on the upper half of the interval outside the trust region, ≥ 1."""
    factor = 1.0
    if bpw < LOW_BPW:
        factor *= 1.25
    if damage > HIGH_DAMAGE:
        factor *= 1.25
    return factor


def warnings(
    model: Model, mix: Sequence[GgmlType | None], damage: float, loss: _Knows
) -> tuple[str, ...]:
    """Return what a reader must know before trusting the prediction, one sentence each."""
    out = []
    bpw = weights_bpw(model, mix)
    if bpw < LOW_BPW:
        out.append(
            f"{bpw:.2f} bits per weight: below {LOW_BPW} mixes of one size differ by tens of "
            "percent and damage does not add up; measure before use"
        )
    share = two_bit_share(model, mix)
    if share > _MANY_TWO_BITS and bpw >= LOW_BPW:
        out.append(
            f"{share:.0%} of the weights are at {_TWO_BITS} bits or less: their damage can be "
            "several times the sum of its parts; measure before use"
        )
    if damage > HIGH_DAMAGE:
        out.append(
            f"damage of {damage:.2f} nats is above {HIGH_DAMAGE}, where predictions were checked"
        )
    out += _extrapolated(model, mix)
    out += _quantized_source(model, mix)
    unknown = prior.unknown_roles(model)
    if unknown:
        out.append(f"nobody measured the sensitivity of {', '.join(unknown)}: a guess is used")
    head = prior.head_role(model)
    if any(
        q is not None and t.role == head and q.bpw < _HEAD_BITS
        for t, q in zip(model.tensors, mix, strict=True)
    ):
        out.append(
            f"{head} below 4 bits: without an imatrix entry for the head it loses about twice as "
            "much (make one with `quantmix imatrix`)"
        )
    if not loss.imatrix:
        out.append(
            "without an importance matrix types lose 1.2 to 3.6 times as much, and models differ: "
            "make one with `quantmix imatrix`"
        )
    if loss.basis == "prior":
        out.append("no measured mix of this model is known: the prediction is mostly the prior's")
    return tuple(out)


def _extrapolated(model: Model, mix: Sequence[GgmlType | None]) -> list[str]:
    total = sum(t.n_elements for t, q in zip(model.tensors, mix, strict=True) if q is not None)
    weights: dict[str, int] = {}
    for t, q in zip(model.tensors, mix, strict=True):
        if q is not None and not curve.gain(q).measured:
            weights[q.name] = weights.get(q.name, 0) + t.n_elements
    guessed = sorted(n for n, size in weights.items() if size > _EXTRAPOLATED * total)
    if not guessed:
        return []
    return [f"{', '.join(guessed)} never measured: placed pessimistically by bits per weight"]


def _quantized_source(model: Model, mix: Sequence[GgmlType | None]) -> list[str]:
    again = sorted(
        {
            t.source_type
            for t, q in zip(model.tensors, mix, strict=True)
            if t.quantizable
            and t.loaded
            and not lossless(t, t.source_type)
            and (q is None or q.name != t.source_type)
        }
    )
    if not again:
        return []
    return [
        f"the source is quantized already ({', '.join(again[:4])}): what it lost is not in the "
        "prediction; start from an unquantized file"
    ]
