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
