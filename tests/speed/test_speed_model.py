"""Seconds per token of plans: additive, ordered as machines are, honest about what is unknown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantmix.errors import UsageError
from quantmix.ggml import types
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.rig.device import Rig
from quantmix.rig.rigs import parse_gpus
from quantmix.speed.model import (
    calibration,
    cell_seconds,
    fixed_seconds,
    plan_seconds,
    predict,
)
from quantmix.speed.prediction import Speed

R1 = load_model("deepseek-r1")
ALL_GPU = Placement((0,) * 61, 0)
ALL_RAM = Placement((0,) * 61, 0, frozenset(range(3, 61)))


def rig(gpus: str = "rtx-pro-6000", gbs: float | None = 358.4) -> Rig:
    """A known card with eight channels of DDR5 behind it."""
    base = parse_gpus(gpus)
    host = replace(base.host, bandwidth_gbs=gbs, card="threadripper-pro-ddr5-5600-8ch")
    return replace(base, host=host, cpu_cores=32, cpu_class="zen4")


def mix_of(model: Model, name: str) -> list[types.GgmlType]:
    """One type for every matrix, where its rows allow."""
    wide, narrow = types.get(name), types.get("q8_0")
    kept = types.get("f32")
    return [
        (wide if t.ncols % 256 == 0 else narrow) if t.quantizable else kept for t in model.tensors
    ]


def test_a_plan_is_the_sum_of_its_cells() -> None:
    """Seconds of a plan are fixed seconds plus one cell per tensor, as the solver assumes."""
    mix = mix_of(R1, "iq4_ks")
    palette = [types.get(n) for n in ("iq4_ks", "q8_0", "f32")]
    cells = cell_seconds(R1, palette, rig())
    total = fixed_seconds(R1, Settings(), rig(), ALL_RAM)
    for i, (t, q) in enumerate(zip(R1.tensors, mix, strict=True)):
        on_host = t.name == "token_embd.weight" or t.role.endswith("_exps")
        total += cells[1 if on_host else 0, i, palette.index(q)]
    assert plan_seconds(R1, Settings(), rig(), ALL_RAM, mix) == pytest.approx(total)


def test_a_filled_cache_costs_time_more_where_it_lies_in_ram() -> None:
    """The speed with a quarter of the context in use stands beside that of an empty cache."""
    model = load_model("qwen3-30b-a3b")
    machine, settings, mix = rig("rtx-3060", 96.0), Settings(ctx=32768), mix_of(model, "q4_K")
    experts = Placement((0,) * 48, 0, frozenset(range(24, 48)))
    layers = Placement((HOST,) * 24 + (0,) * 24, 0)
    lost = []
    for placement in (experts, layers):
        speed = predict(model, settings, machine, placement, mix)
        assert speed.filled_tokens == 8192
        assert speed.tg_tps is not None
        assert speed.tg_filled_tps is not None
        lost.append(1 / speed.tg_filled_tps - 1 / speed.tg_tps)
        assert f"{speed.tg_filled_tps:.1f} with 8192 tokens" in str(speed)
        there = predict(model, settings, machine, placement, mix, n_kv=8192)
        assert there.tg_tps == pytest.approx(speed.tg_filled_tps)
    assert lost[1] > 1.5 * lost[0] > 0.0


def test_cells_have_devices_tensors_and_types_as_axes() -> None:
    """GPUs first, then the host; values are finite and never negative."""
    palette = list(types.default_palette())
    cells = cell_seconds(R1, palette, rig("2xrtx-5090"))
    assert cells.shape == (3, len(R1.tensors), len(palette))
    assert np.all(np.isfinite(cells))
    assert np.all(cells >= 0)


def test_only_the_experts_in_use_are_read() -> None:
    """An expert tensor of R1 costs 1/32 of what its size would."""
    q = types.get("q8_0")
    i = next(i for i, t in enumerate(R1.tensors) if t.name == "blk.5.ffn_up_exps.weight")
    j = next(i for i, t in enumerate(R1.tensors) if t.name == "blk.5.ffn_up_shexp.weight")
    cells = cell_seconds(R1, [q], rig())
    assert cells[0, i, 0] == pytest.approx(8 * cells[0, j, 0])


def test_a_tied_head_is_read_once_per_token() -> None:
    """The embedding of a model with an output matrix costs nothing, a tied one its full size."""
    tied = load_model("llama-3.2-1b")
    i = next(i for i, t in enumerate(tied.tensors) if t.role == "token_embd")
    q = [types.get("q8_0")]
    assert cell_seconds(tied, q, rig())[0, i, 0] > 0
    embed = next(i for i, t in enumerate(R1.tensors) if t.role == "token_embd")
    assert cell_seconds(R1, q, rig())[0, embed, 0] == 0


def test_slow_types_are_bound_by_the_cpu_and_not_by_memory() -> None:
    """iq2_kt in RAM takes longer than iq4_ks although it has half the bytes; on a GPU less."""
    kt, ks = types.get("iq2_kt"), types.get("iq4_ks")
    i = next(i for i, t in enumerate(R1.tensors) if t.role == "ffn_down_exps")
    few_cores = replace(rig(), cpu_cores=12)
    cells = cell_seconds(R1, [kt, ks], few_cores)[:, i, :]
    assert cells[1, 0] > cells[1, 1]
    assert cells[0, 0] < cells[0, 1]


def test_a_type_without_a_cuda_kernel_is_dear_on_a_gpu() -> None:
    """Putting q4_k_r4 on a GPU costs more than leaving it in RAM."""
    q = types.get("q4_k_r4")
    i = next(i for i, t in enumerate(R1.tensors) if t.role == "ffn_down_exps")
    cells = cell_seconds(R1, [q], rig())[:, i, 0]
    assert cells[0] > cells[1]


def test_experts_on_the_gpu_are_faster() -> None:
    """Every expert layer moved from RAM to the GPU raises tokens per second."""
    mix = mix_of(R1, "iq4_ks")
    speeds = [
        predict(R1, Settings(), rig(), Placement((0,) * 61, 0, frozenset(range(n, 61))), mix)
        for n in (3, 20, 40, 61)
    ]
    tps = [s.tg_tps or 0 for s in speeds]
    assert tps == sorted(tps)
    assert tps[-1] > 2 * tps[0]


def test_the_band_holds_the_prediction_and_shrinks_when_calibrated() -> None:
    """Low < predicted < high; one measured row moves the figure and narrows the band."""
    mix = mix_of(R1, "iq4_ks")
    plain = predict(R1, Settings(), rig(), ALL_RAM, mix)
    assert plain.tg_low
    assert plain.tg_tps
    assert plain.tg_high
    assert plain.pp_tps
    assert plain.tg_low < plain.tg_tps < plain.tg_high
    scaled = predict(
        R1, Settings(), rig(), ALL_RAM, mix, scale=calibration(plain.tg_tps * 0.8, plain)
    )
    assert scaled.tg_tps == pytest.approx(plain.tg_tps * 0.8)
    assert scaled.tg_low
    assert scaled.tg_high
    assert scaled.tg_high / scaled.tg_low < plain.tg_high / plain.tg_low


def test_published_runs_lie_in_the_band() -> None:
    """R1 IQ4_KS-class mixes on a 7975WX ran at 11 to 17 tokens per second with one RTX 5090."""
    speed = predict(R1, Settings(), rig("rtx-5090"), ALL_RAM, mix_of(R1, "iq4_ks"))
    assert speed.tg_low
    assert speed.tg_high
    assert speed.tg_low < 14 < speed.tg_high


def test_unknown_bandwidth_gives_no_speed() -> None:
    """A card given by size, or RAM of an unknown kind that holds experts, predicts nothing."""
    mix = mix_of(R1, "iq4_ks")
    assert predict(R1, Settings(), parse_gpus("2x96G"), ALL_GPU, mix) == Speed()
    assert predict(R1, Settings(), rig(gbs=None), ALL_RAM, mix) == Speed()
    assert predict(R1, Settings(), rig(gbs=None), ALL_GPU, mix).tg_tps
    with pytest.raises(UsageError, match="calibrate"):
        calibration(10.0, Speed())


def test_a_long_context_costs_time() -> None:
    """Reading 30k tokens of cache makes a token slower, more so with the cache in RAM."""
    mix = mix_of(R1, "iq2_kt")
    empty, full = (
        predict(R1, Settings(), rig(), ALL_GPU, mix, n_kv=n).tg_tps or 0 for n in (0, 30_000)
    )
    in_ram = predict(R1, Settings(nkvo=True), rig(), ALL_GPU, mix, n_kv=30_000).tg_tps or 0
    assert empty > full > in_ram


def test_layers_in_ram_cost_barriers_of_their_own() -> None:
    """A layer wholly on the CPU has another constant than one on a GPU."""
    half = Placement((HOST,) * 30 + (0,) * 31, 0)
    a = fixed_seconds(R1, Settings(), rig(), ALL_GPU)
    b = fixed_seconds(R1, Settings(), rig(), half)
    assert a != b
    assert fixed_seconds(R1, Settings(), rig(), ALL_RAM) > a


def test_a_big_ubatch_uploads_experts_and_speeds_prompts_up() -> None:
    """ik copies experts to the GPU from ubatch 1024 on for R1: prompts get faster with 4096."""
    mix = mix_of(R1, "iq4_ks")
    small = predict(R1, Settings(ubatch=1024), rig(), ALL_RAM, mix).pp_tps or 0
    large = predict(R1, Settings(ubatch=4096, batch=4096), rig(), ALL_RAM, mix).pp_tps or 0
    assert large > 2 * small


def test_the_link_of_a_rig_counts() -> None:
    """`pcie_gbs` of a rig stands in for the figure fitted for its card."""
    mix = mix_of(R1, "iq4_ks")
    settings = Settings(ubatch=4096, batch=4096)
    speeds = [
        predict(R1, settings, replace(rig(), pcie_gbs=gbs), ALL_RAM, mix).pp_tps or 0
        for gbs in (5.0, 50.0)
    ]
    assert 3 * speeds[0] < speeds[1]


def test_a_tied_head_is_read_where_the_output_is() -> None:
    """RAM of unknown speed does not matter while the head is on the GPU; in RAM it does."""
    tied = load_model("llama-3.2-1b")
    mix, n = mix_of(tied, "iq4_ks"), tied.hparams.n_layer
    on_gpu = predict(tied, Settings(), rig(gbs=None), Placement((0,) * n, 0), mix)
    assert on_gpu.tg_tps
    assert predict(tied, Settings(), rig(gbs=None), Placement((0,) * n, HOST), mix) == Speed()
    slow = predict(tied, Settings(), rig(), Placement((0,) * n, HOST), mix)
    assert slow.tg_tps
    assert slow.pp_tps
    assert on_gpu.pp_tps
    assert slow.tg_tps < on_gpu.tg_tps
    assert 2 * slow.pp_tps < on_gpu.pp_tps
