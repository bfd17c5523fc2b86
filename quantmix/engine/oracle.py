"""`check --oracle`: the memory plan against what a real mainline libllama counts, on the CPU.

A ghost of the designed file (true header, designed types, no data) is loaded with `no_alloc`, a
context is made, and the engine's own sums are compared: weights and KV cache must be equal, and the
bound of the compute buffer must be above the engine's. Everything lies on the host, because no GPU
is needed for that; it shows that sizes and cache formulas are right, not what a GPU's compute
buffer holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from quantmix.engine.mainline import measure_memory
from quantmix.engine.mainline_find import Mainline, find_mainline
from quantmix.errors import UsageError
from quantmix.ggml import types
from quantmix.memory import kv
from quantmix.memory.head import is_tied
from quantmix.memory.model import HOST, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import NEWEST_BUILD, Settings
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model
from quantmix.recipe import Recipe
from quantmix.rig.device import Device, Rig
from quantmix.units import MIB

LIMITS: Final = (
    "The oracle is mainline llama.cpp on the CPU: it proves weight and KV cache sizes. It says "
    "nothing about the compute buffers of ik_llama.cpp on CUDA, nor of mainline on a GPU."
)
TOLERANCE_BYTES: Final = MIB // 100  # ±0.01 MiB, the rounding of the engines' logs

# The loader of these makes the output matrix before the embedding, so that on one and the same
# device both exist (llama.cpp src/models/gemma4.cpp); others find the embedding and share it.
_EMBEDDING_TWICE: Final = frozenset({"gemma4"})


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity: planned and counted bytes; `equal` ones must agree, others bound from above."""

    what: str
    planned_bytes: int
    engine_bytes: int
    equal: bool

    @property
    def difference_bytes(self) -> int:
        """Planned minus counted."""
        return self.planned_bytes - self.engine_bytes

    @property
    def ok(self) -> bool:
        """Whether the plan holds for this quantity."""
        if self.equal:
            return abs(self.difference_bytes) <= TOLERANCE_BYTES
        return self.difference_bytes >= 0


@dataclass(frozen=True, slots=True)
class OracleReport:
    """What the oracle said: weights, KV cache, compute buffer; `limits` belongs in every output."""

    comparisons: tuple[Comparison, ...]
    engine: Mainline
    limits: str = LIMITS

    @property
    def ok(self) -> bool:
        """Whether every comparison holds."""
        return all(c.ok for c in self.comparisons)

    def __str__(self) -> str:
        """The report for people: one line per quantity, then what it does not say."""
        lines = [f"memory by {self.engine.version} ({self.engine.origin}), all on the host:"]
        for c in self.comparisons:
            how = "equal" if c.equal else "bound"
            verdict = "holds" if c.ok else "DOES NOT HOLD"
            lines.append(
                f"  {c.what}: planned {c.planned_bytes / MIB:.2f} MiB ({how}), "
                f"engine {c.engine_bytes / MIB:.2f} MiB: {verdict}"
            )
        return "\n".join([*lines, self.limits])

    def to_json(self) -> dict[str, Any]:
        """Return the report for `check --json`."""
        return {
            "ok": self.ok,
            "engine": f"{self.engine.version} ({self.engine.origin})",
            "comparisons": [
                {
                    "what": c.what,
                    "planned_bytes": c.planned_bytes,
                    "engine_bytes": c.engine_bytes,
                    "difference_bytes": c.difference_bytes,
                    "must_be_equal": c.equal,
                    "ok": c.ok,
                }
                for c in self.comparisons
            ],
            "limits": self.limits,
        }


def check_memory(
    model: Model,
    type_of: Mapping[str, str],
    settings: Settings,
    *,
    engine: Mainline | None = None,
) -> OracleReport:
    """Compare the memory plan of `model` at `type_of` (tensor to type) with mainline's own count.

    Settings of an ik plan are taken over and judged by mainline's rules (its cache of
    sliding-window layers is smaller, for one).

    Raises:
        UsageError: a type that mainline does not have, or a tensor without a type.
        EngineMissing: no mainline libllama was found.
        EngineError: the engine refused the ghost; its own words are shown.
    """
    foreign = sorted({t for t in type_of.values() if t not in types.table("mainline")})
    if foreign:
        raise UsageError(
            f"the oracle is mainline llama.cpp, which has no {', '.join(foreign)}: it can only "
            "check designs made with `--engine mainline`"
        )
    used = engine or find_mainline("memory")
    wanted = _mainline(model, settings)
    with tempfile.TemporaryDirectory(prefix="quantmix-") as folder:
        ghost = Path(folder) / "ghost.gguf"
        write_ghost(ghost, model, type_of, engine="mainline")
        found = measure_memory(ghost, wanted, engine=used).total
    plan = device_memory(
        model,
        wanted,
        Rig((), Device("CPU", "host", None)),
        Placement((HOST,) * kv.n_blocks(model), HOST),
    )[-1]
    weights = weights_on_host(model, type_of, mtp=wanted.mtp)
    cache = sum(kv.kv_bytes(model, replace(wanted, mtp=False)))
    return OracleReport(
        comparisons=(
            Comparison("weights", weights, found.weights_bytes, True),
            Comparison("kv", cache, found.context_bytes, True),
            Comparison("compute", plan.compute_bytes(), found.compute_bytes, False),
        ),
        engine=used,
    )


def check_recipe(recipe: Recipe, model: Model, *, engine: Mainline | None = None) -> OracleReport:
    """Ask the oracle about a recipe; its own sums over devices are compared as well.

    Raises:
        UsageError: the recipe holds types that mainline does not have.
        EngineMissing: no mainline libllama was found.
        EngineError: the engine refused the ghost.
    """
    type_of = {t.name: t.type for t in recipe.tensors}
    report = check_memory(model, type_of, recipe.settings, engine=engine)
    if recipe.engine.name != "mainline" or recipe.settings.mtp:
        return report
    counted = next(c.engine_bytes for c in report.comparisons if c.what == "kv")
    planned = sum(d.kv_bytes for d in recipe.devices)
    own = Comparison("kv over the recipe's devices", planned, counted, True)
    return replace(report, comparisons=(*report.comparisons, own))


def weights_on_host(model: Model, type_of: Mapping[str, str], *, mtp: bool) -> int:
    """Bytes of the loaded file tensors when all of them lie on the host, in mainline."""
    table = types.table("mainline")
    total = sum(
        table[type_of[t.name]].tensor_bytes(t.shape) for t in model.tensors if t.loaded or mtp
    )
    if model.arch in _EMBEDDING_TWICE and is_tied(model):
        embedding = model.by_name["token_embd.weight"]
        total += table[type_of[embedding.name]].tensor_bytes(embedding.shape)
    return total


def _mainline(model: Model, settings: Settings) -> Settings:
    """The same launch under mainline's rules; a latent cache has one type, as the flags say."""
    build = settings.build if settings.engine == "mainline" else NEWEST_BUILD["mainline"]
    ctv = settings.ctk if model.hparams.is_mla else settings.ctv
    return replace(settings, engine="mainline", build=build, ctv=ctv)
