"""Loss models: from types to damage in nats, and from damage to perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantmix.ggml.types import Engine
from quantmix.loss.model import LossModel
from quantmix.models.model import Model

if TYPE_CHECKING:
    from quantmix.store import Measurement


def load(
    model: Model,
    *,
    engine: Engine = "ik",
    imatrix: bool = True,
    measurements: Path | None = None,
    own: Sequence[Measurement] = (),
) -> LossModel:
    """Return the best loss model known for `model`.

    Own `measurements` (what `quantmix measure` writes) where given; else the prior, calibrated on
    one's `own` measured files of this model (rows of the store) when there are at least three
    mixes, else on the published measurements of the model where there are any. The same type
    means the same rounding in both engines, so `engine` only decides which types are asked for.

    Raises:
        BadFile: `measurements` cannot be read.
        UsageError: they were made around a quantized mix.
    """
    if measurements is not None:
        from quantmix import measurements as files
        from quantmix.loss.measured import MeasuredModel

        return MeasuredModel.of(model, files.load(measurements), imatrix=imatrix)
    from quantmix.loss.predictor import FittedModel

    mine = FittedModel.of_own(model, own, imatrix=imatrix) if own else None
    return mine or FittedModel.of(model, imatrix=imatrix)
