"""quantmix: design, check, quantize and verify GGUF quantization mixes for a memory budget.

import quantmix as qm
model  = qm.load_model("deepseek-r1")
budget = qm.Budget.from_gpus("2x96G", ctx=32768)
recipe = qm.design(model, budget, engine="ik")
recipe.save("recipes/mine"); qm.check(recipe)
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Names are loaded on first use, so that `import quantmix` and `quantmix --help` stay fast.
_PUBLIC = {
    "Budget": "quantmix.budget",
    "Model": "quantmix.models.model",
    "Recipe": "quantmix.recipe",
    "QuantmixError": "quantmix.errors",
    "load_model": "quantmix.models.sources",
    "load_recipe": "quantmix.recipe:load",
    "design": "quantmix.design",
    "check": "quantmix.engine.ghost:check",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'quantmix' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)
