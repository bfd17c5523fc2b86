"""Models whose MTP (multi-token prediction) blocks are loaded and run, which they are not else."""

from __future__ import annotations

from dataclasses import replace

from quantmix.memory.head import is_tied
from quantmix.memory.settings import Settings
from quantmix.models.arch.base import active_fraction
from quantmix.models.model import Model, Tensor


def with_mtp(model: Model, settings: Settings) -> Model:
    """Return the model as `settings` run it: with `--mtp` its MTP blocks are loaded and read."""
    if not settings.mtp or all(t.loaded for t in model.tensors):
        return model
    has_k_b = any(t.role == "attn_k_b" for t in model.tensors)

    def run(t: Tensor) -> Tensor:
        share = active_fraction(
            t.name, model.hparams, has_output=not is_tied(model), has_k_b=has_k_b
        )
        return replace(t, loaded=True, active_fraction=share)

    return replace(model, tensors=tuple(t if t.loaded else run(t) for t in model.tensors))
