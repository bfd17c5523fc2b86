"""The seam between damage and the rest: what a loss model must answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantmix.ggml.types import GgmlType
from quantmix.loss.quality import Quality
from quantmix.models.model import Model

FloatArray = NDArray[np.float64]


class LossModel(Protocol):
    """Predicts what quantizing does to a model."""

    @property
    def basis(self) -> str:
        """What the prediction rests on: `prior`, `calibrated` or `measured`."""
        ...

    def damage(self, model: Model, types: Sequence[GgmlType]) -> FloatArray:
        """Return damage in nats, shape (n_tensors, n_types), of giving each tensor each type.

        Additive: the damage of a mix is the sum. `types` are types really written (the caller
        has applied fallbacks); rows of tensors that cannot be quantized are zero. Values are ≥ 0.
        With an importance matrix, and but for sensitivities measured on the model itself, they
        never fall from a type to a worse one of the same family; without one some types are so
        much worse that they do.
        """
        ...

    def quality(self, model: Model, mix: Sequence[GgmlType | None]) -> Quality:
        """Predict the whole mix: one type per tensor of the model, None = kept as in the source."""
        ...


def mix_damage(loss: LossModel, model: Model, mix: Sequence[GgmlType | None]) -> FloatArray:
    """Return the damage of each tensor in a mix in nats, shape (n_tensors,)."""
    types = {t.name: t for t in mix if t is not None}
    cells = loss.damage(model, list(types.values()))
    column = {name: j for j, name in enumerate(types)}
    return np.array([0.0 if t is None else cells[i, column[t.name]] for i, t in enumerate(mix)])


def total(damage: FloatArray) -> float:
    """Return the damage of a mix in nats: tensors added in file order, the same digits anywhere."""
    added = 0.0
    for value in damage:
        added += float(value)
    return added
