"""Loss models: from types to damage in nats, and from damage to perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantmix.errors import BadFile
from quantmix.ggml.types import Engine
from quantmix.loss.model import LossModel
from quantmix.models.model import Model

if TYPE_CHECKING:
    from quantmix.measurements import Measurements
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
        BadFile: `measurements` cannot be read, or are of another model.
        UsageError: they were made around a quantized mix.
    """
    if measurements is not None:
        from quantmix import measurements as files
        from quantmix.loss.measured import MeasuredModel

        measured = files.load(measurements)
        _same_model(model, measured, measurements)
        return MeasuredModel.of(model, measured, imatrix=imatrix)
    from quantmix.loss.predictor import FittedModel

    mine = FittedModel.of_own(model, own, imatrix=imatrix) if own else None
    return mine or FittedModel.of(model, imatrix=imatrix)


def _same_model(model: Model, measured: Measurements, file: Path) -> None:
    """Refuse results of another model.

    A GGUF is told by its fingerprint. A model of the catalog has none, and neither has a table of
    another tool: the name must not be that of another model, nor its roles of another size.
    """
    path = Path(model.source)
    why = ""
    if model.header_bytes is not None and path.exists() and not measured.is_table:
        from quantmix.ggml.weights import open_weights

        if open_weights(path).model_fingerprint != measured.model:
            why = "names, shapes or norms differ"
    else:
        from quantmix.loss.evidence import catalog_id

        known = catalog_id(measured.model_name)
        why = f"that is {known}" if known not in (None, model.id) else _other_size(model, measured)
    if why:
        raise BadFile(
            f"{file} was measured on {measured.model_name or 'another model'}, not on {model.id}: "
            f"{why}; run `quantmix measure` on the model itself"
        )


def _other_size(model: Model, measured: Measurements) -> str:
    """Return which probed role has not as many weights in `model`, empty when all agree."""
    sizes: dict[str, int] = {}
    for t in model.tensors:
        sizes[t.role] = sizes.get(t.role, 0) + t.n_elements
    for p in measured.probes:
        if p.scope == "role" and not p.layers and p.n_elements != sizes.get(p.role, 0):
            return f"{p.role} has {p.n_elements:,} weights there, {sizes.get(p.role, 0):,} here"
    return ""
