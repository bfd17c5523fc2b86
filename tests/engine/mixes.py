"""Recipes made by hand for tests and benchmarks: a type per tensor of a real file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from quantmix.ggml import types
from quantmix.ggml.weights import WeightsFile, open_weights
from quantmix.loss.quality import Quality
from quantmix.memory.settings import Settings
from quantmix.models.roles import is_quantizable, split_name
from quantmix.recipe import (
    EngineInfo,
    ModelInfo,
    Optimality,
    PlannedTensor,
    Recipe,
    Size,
)
from quantmix.speed.prediction import Speed


def mix_of(weights: WeightsFile, choose: Callable[[str, int | None], str | None]) -> dict[str, str]:
    """Return tensor → asked type; `choose(role, layer)` says which, None keeps the source type."""
    asked = {}
    for name, (info, _, _) in weights.tensors.items():
        role, layer = split_name(name)
        kind = choose(role, layer) if is_quantizable(name, info.shape) else None
        asked[name] = kind or info.type.name
    return asked


def recipe_of(source: str | Path, mix: Mapping[str, str], ftype: str = "Q4_K") -> Recipe:
    """Return a recipe for ik that gives each tensor of `source` the type `mix` asks for."""
    weights = open_weights(source)
    planned, rules = [], []
    for name, (info, _, _) in weights.tensors.items():
        role, layer = split_name(name)
        kind = info.type
        if is_quantizable(name, info.shape):
            kind = types.get(mix[name])
            if mix[name] != info.type.name:
                kind = types.resolve(mix[name], name, info.shape)
            rules.append(f"^{re.escape(name)}$={mix[name]}")
        n_bytes = kind.tensor_bytes(info.shape)
        planned.append(PlannedTensor(name, info.shape, role, layer, kind.name, n_bytes, "CPU", 0.0))
    total = sum(t.bytes for t in planned)
    elements = sum(info.n_bytes // 2 for info, _, _ in weights.tensors.values())
    return Recipe(
        model=ModelInfo("test", "llama", "plain", len(planned), elements, str(source)),
        engine=EngineInfo("ik", "test", ftype),
        settings=Settings(),
        size=Size(total, total, False, 0, 8 * total / elements),
        devices=(),
        quality=Quality(0.0, 0.0, None, None, None, None, "measured"),
        optimality=Optimality("feasible", 0.0, 0.0, 0.0),
        speed=Speed(),
        types={},
        rules=tuple(rules),
        commands={},
        offload={},
        tensors=tuple(planned),
    )
