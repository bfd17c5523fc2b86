"""Models and rigs that the memory tests share, made by hand from published hyper-parameters."""

from __future__ import annotations

import pytest

from quantmix.models.model import HParams, Layout, Model
from quantmix.rig.device import Device, Rig
from quantmix.units import GIB

R1 = HParams(
    n_layer=61,
    n_embd=7168,
    n_vocab=129280,
    n_head=128,
    n_head_kv=128,
    head_dim_k=192,
    head_dim_v=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    rope_dim=64,
    n_dense_lead=3,
    n_ff=18432,
    n_ff_exp=2048,
    n_ff_shexp=2048,
    n_expert=256,
    n_expert_used=8,
)
QWEN3_235B = HParams(
    n_layer=94,
    n_embd=4096,
    n_vocab=151936,
    n_head=64,
    n_head_kv=4,
    head_dim_k=128,
    head_dim_v=128,
    n_ff_exp=1536,
    n_expert=128,
    n_expert_used=8,
)


def bare(h: HParams, layout: Layout = "plain", arch: str = "") -> Model:
    """A model without tensors: enough for KV, compute and derived bytes."""
    return Model(id="m", arch=arch, layout=layout, hparams=h, tensors=())


@pytest.fixture
def r1() -> Model:
    """DeepSeek-R1 in the layout of today's converters."""
    return bare(R1, "split", "deepseek2")


@pytest.fixture
def qwen() -> Model:
    """Qwen3-235B-A22B."""
    return bare(QWEN3_235B, arch="qwen3moe")


@pytest.fixture
def two_cards() -> Rig:
    """Two 96 GiB cards and 384 GiB of RAM."""
    return Rig(
        gpus=(Device("GPU0", "gpu", 96 * GIB), Device("GPU1", "gpu", 96 * GIB)),
        host=Device("CPU", "host", 384 * GIB),
    )
