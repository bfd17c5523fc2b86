"""Loss models: from types to damage in nats, and from damage to perplexity."""

from __future__ import annotations

from pathlib import Path

from quantmix.ggml.types import Engine
from quantmix.loss.model import LossModel
from quantmix.models.model import Model


def load(
    model: Model,
    *,
    engine: Engine = "ik",
    imatrix: bool = True,
    measurements: Path | None = None,
) -> LossModel:
    """Return the best loss model known for `model`.

    Own `measurements` (what `quantmix measure` writes) where given; else the prior, calibrated on
    the published measurements of the model where there are any. The same type means the same
    rounding in both engines, so `engine` only decides which types will be asked for.

    Raises:
        BadFile: `measurements` cannot be read.
        UsageError: they were made around a quantized mix.
    """
    if measurements is not None:
        from quantmix import measurements as files
        from quantmix.loss.measured import MeasuredModel

        return MeasuredModel.of(model, files.load(measurements), imatrix=imatrix)
    from quantmix.loss.predictor import FittedModel

    return FittedModel.of(model, imatrix=imatrix)
