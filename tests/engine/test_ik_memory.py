"""The memory model against the packaged engine, asked on the CPU."""

from __future__ import annotations

import pytest

from quantmix.engine.ik_memory import measure, shortened
from quantmix.memory.compute import DeviceRole, output_bytes, regimes
from quantmix.memory.kv import kv_bytes
from quantmix.memory.margins import safe
from quantmix.memory.settings import Settings
from quantmix.models.sources import load_model
from quantmix.units import MIB

ALL = DeviceRole(first=True, layers=True, experts=True, output=True)

CASES = [
    ("deepseek-r1", "ik", 4, Settings(ctx=32768), 0.08),
    ("deepseek-r1", "ik", 4, Settings(ctx=131072, ubatch=1024), 0.08),
    ("deepseek-r1", "ik", 4, Settings(ctx=32768, ctk="q8_0"), 0.20),
    ("deepseek-r1", "ik", 4, Settings(ctx=32768, mla=1), 0.08),
    ("deepseek-r1", "ik", 4, Settings(ctx=32768, amb=0), 0.10),
    ("qwen3-235b-a22b", None, 3, Settings(ctx=65536, ubatch=2048), 0.04),
    ("llama-3.1-70b", None, 3, Settings(ctx=8192), 0.07),
    ("qwen3.5-122b-a10b", None, 4, Settings(ctx=8192), 0.02),
]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "layers", "settings", "tolerance"), CASES)
def test_newest_engine_on_the_cpu(
    name: str, layout: str | None, layers: int, settings: Settings, tolerance: float
) -> None:
    """KV and output are what the engine logs; the estimate is near its buffer, the bound above."""
    model = shortened(load_model(name, layout=layout), layers)
    found = measure(model, settings)
    assert sum(kv_bytes(model, settings)) == pytest.approx(found.kv_bytes, abs=0.02 * MIB)
    assert output_bytes(model, settings) == pytest.approx(found.output_bytes, abs=0.006 * MIB)
    estimate = max(r.constant_bytes for r in regimes(model, settings, ALL))
    assert estimate == pytest.approx(found.compute_bytes, rel=tolerance)
    bound = max(r.constant_bytes for r in safe(regimes(model, settings, ALL, upper=True)))
    assert bound >= found.compute_bytes


def test_a_shortened_model_keeps_its_first_layers() -> None:
    """Layers beyond the number and MTP blocks go, embeddings and output stay."""
    model = shortened(load_model("glm-4.5-air"), 2)
    assert {t.layer for t in model.tensors} == {None, 0, 1}
    assert {"token_embd.weight", "output.weight"} <= set(model.by_name)
    assert model.hparams.n_layer == 2
    assert not model.hparams.nextn_in_gguf
