"""Recipes that somebody solved tensor by tensor, knowing more about the model than a prior can.

Our shares follow a smooth shape over depth. Who measured every tensor of a model and then chose
its types gives more bits to the tensors that need them for reasons no shape knows; such recipes
measure better than the shape predicts. It shows in the recipe: within a role the types change
from layer to layer, up and down and by no rule, where a mix made by class (or by our own solver,
from a smooth prior) changes a few times over the whole depth. With v the deviation of ln gain from
its own smooth course over depth, the share of a tensor is taken as

    s' = s · exp(−ρ f tanh v), the total of the role unchanged                              (4)

with f from 0 to 1 as such changes grow beyond doubt (`chosen`). It is what one expects of a share
whose unknown part varies along with v (a regression; ρ would be 0 for types drawn at random, 1 for
a solver with perfect knowledge); tanh since what a shape over depth does not know of a tensor is no
factor of ten. ρ is fitted over models, on recipes predicted from other people's mixes (params.json:
`solved`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np

from quantmix.ggml.types import GgmlType
from quantmix.loss import curve, features
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model

# Changes of type from layer to layer beyond those that sorted order needs, per layer: designs of
# ours reach 0.054, recipes of a tool mostly 0.1 to 0.3. Between the two (4) fades in.
ALTERNATING: Final = (0.06, 0.15)
_SURPLUS: Final = (2, 4)
# A pattern that repeats over the middle three quarters of the depth is a rule, not knowledge: the
# presets of llama-quantize give every third layer there more bits (`use_more_bits`).
_PERIODS: Final = range(2, 7)
_REPEATS: Final = 0.95
_MIN_LAYERS: Final = 8


def shares(
    model: Model, share: FloatArray, mix: Sequence[GgmlType | str | None], rho: float
) -> FloatArray:
    """Return shares by (4), shape (n_tensors,): unchanged where types do not alternate.

    `mix` holds a type (or its curve name) per tensor, None where a tensor is kept.
    """
    by_role: dict[str, list[int]] = defaultdict(list)
    ln_gain = np.full(len(model.tensors), np.nan)
    for i, (tensor, qtype) in enumerate(zip(model.tensors, mix, strict=True)):
        if qtype is None or tensor.layer is None or share[i] <= 0.0:
            continue
        name = qtype if isinstance(qtype, str) else curve.own_name(qtype)
        column = features.columns().get(name)
        if column is not None:
            ln_gain[i] = features.ln_gains()[column]
            by_role[tensor.role].append(i)
    out = share.copy()
    for members in by_role.values():
        layers = [model.tensors[i].layer or 0 for i in members]
        order = np.array(members)[np.argsort(layers, kind="stable")]
        values = ln_gain[order]
        sure = chosen(values)
        if sure == 0.0:
            continue
        depth = np.sort(layers) / max(1, model.hparams.n_layer - 1)
        weight = share[order]
        tilted = weight * np.exp(-rho * sure * np.tanh(_deviation(depth, values, weight)))
        out[order] = tilted * (weight.sum() / tilted.sum())
    return out


def chosen(values: FloatArray) -> float:
    """Return from 0 to 1 how much the ln gains of a role, in layer order, look chosen by tensor."""
    if len(values) < _MIN_LAYERS or _periodic(values):
        return 0.0
    extra = surplus(values)
    return min(_between(extra / (len(values) - 1), *ALTERNATING), _between(extra, *_SURPLUS))


def _between(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def surplus(values: FloatArray) -> int:
    """Return how often `values` (in layer order) change beyond what sorted order needs.

    Values that rise and fall once over the depth need two changes for every value but one.
    """
    changes = int(np.count_nonzero(values[1:] != values[:-1]))
    return max(0, changes - 2 * (len(np.unique(values)) - 1))


def _periodic(values: FloatArray) -> bool:
    """Whether the middle three quarters repeat with a short period."""
    eighth = len(values) // 8 + 1
    middle = values[eighth : len(values) - eighth]
    return any(
        len(middle) > 2 * p and np.mean(middle[p:] == middle[:-p]) >= _REPEATS for p in _PERIODS
    )


def _deviation(depth: FloatArray, values: FloatArray, weight: FloatArray) -> FloatArray:
    """Return `values` minus their weighted least-squares parabola over `depth`."""
    root = np.sqrt(weight / weight.sum())
    terms = np.stack([np.ones_like(depth), depth, depth * depth], axis=1)
    fitted = np.linalg.lstsq(terms * root[:, None], values * root, rcond=None)[0]
    return np.asarray(values - terms @ fitted)
