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

    Raises:
        BadFile: `measurements` cannot be read.
    """
    from quantmix.loss.prior import PriorModel

    return PriorModel.of(model, engine=engine, imatrix=imatrix)
