"""Compare mainline's compute buffers with the estimates of `quantmix.memory.mainline_graph`.

`python -m quantmix.engine.mainline_sweep`: every geometry of the catalog is loaded as a ghost under
several launches (no memory is allocated), and the engine's buffer is divided by the estimate.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from quantmix.engine.mainline import measure_memory
from quantmix.engine.mainline_find import Mainline, find_mainline
from quantmix.errors import QuantmixError
from quantmix.ggml import types
from quantmix.memory.compute import DeviceRole
from quantmix.memory.mainline_graph import regimes
from quantmix.memory.settings import NEWEST_BUILD, Settings
from quantmix.models.catalog import catalog
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.units import MIB

_BASE: Final = Settings(engine="mainline", build=NEWEST_BUILD["mainline"])
LAUNCHES: Final = (
    _BASE,
    replace(_BASE, ubatch=2048),
    replace(_BASE, ctx=8192, ctk="q8_0", ctv="q8_0", ubatch=1024),
    replace(_BASE, ctx=131072),
    replace(_BASE, fa=False),
    replace(_BASE, ctx=4096),
    replace(_BASE, ctx=16384, ubatch=1024, parallel=2, ctk="q8_0", ctv="q8_0"),
    replace(_BASE, parallel=4),
    replace(_BASE, ctx=65536, ubatch=128),
)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One compute buffer of the engine, and the regime that is estimated to fill it."""

    model: str
    settings: Settings
    engine_bytes: int
    estimate_bytes: int
    regime: str

    @property
    def ratio(self) -> float:
        """Engine over estimate: what a safety factor must be above."""
        return self.engine_bytes / self.estimate_bytes


def measure(
    model: Model, launches: tuple[Settings, ...] = LAUNCHES, *, engine: Mainline | None = None
) -> Iterator[Buffer]:
    """Yield the buffers of a model under each launch, everything on the CPU.

    Raises:
        EngineMissing: no mainline libllama was found.
        EngineError: the engine refused the ghost.
    """
    used = engine or find_mainline("memory")
    role = DeviceRole(
        first=True, layers=True, experts=True, output=True, cpu_experts=True, host=True
    )
    type_of = {
        t.name: types.resolve("q4_K", t.name, t.shape, "mainline").name if t.quantizable else "f32"
        for t in model.tensors
    }
    with tempfile.TemporaryDirectory(prefix="quantmix-") as folder:
        ghost = Path(folder) / "ghost.gguf"
        write_ghost(ghost, model, type_of, engine="mainline")
        for settings in launches:
            found = measure_memory(ghost, settings, engine=used).total.compute_bytes
            most = max(regimes(model, settings, role), key=lambda r: r.constant_bytes)
            yield Buffer(model.id, settings, found, most.constant_bytes, most.name)


def geometries() -> Iterator[Model]:
    """Yield one catalog model of each geometry."""
    seen: set[str] = set()
    for name in catalog():
        model = load_model(name)
        key = f"{model.arch} {model.hparams}"
        if key not in seen:
            seen.add(key)
            yield model


def main() -> int:
    """Print one line per regime: number of buffers, median and largest engine/estimate."""
    try:
        engine = find_mainline("memory")
        buffers = [b for model in geometries() for b in measure(model, engine=engine)]
    except QuantmixError as err:
        print(f"quantmix: {err}", file=sys.stderr)
        return err.exit_code
    print(f"{engine.version} ({engine.origin}), {len(buffers)} buffers")
    for name in sorted({b.regime for b in buffers}):
        mine = sorted((b for b in buffers if b.regime == name), key=lambda b: b.ratio)
        worst = mine[-1]
        print(
            f"{name:14}{len(mine):5} median {mine[len(mine) // 2].ratio:.3f} "
            f"largest {worst.ratio:.3f} ({worst.model}, {worst.engine_bytes / MIB:.0f} MiB)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
