"""The prior: shares, curve, additivity."""

from __future__ import annotations

import time

import numpy as np

from quantmix import loss
from quantmix.ggml.types import default_palette, get, table
from quantmix.loss import curve
from quantmix.models.model import HParams, Model, Tensor


def r1_like(n_layer: int = 61) -> Model:
    """A model with the tensors of DeepSeek-R1 (split layout), made by hand."""
    e, x = 7168, 256
    tensors = [
        Tensor("token_embd.weight", (e, 129280), "bf16", "token_embd", None, 0.0),
        Tensor("output.weight", (e, 129280), "bf16", "output", None),
        Tensor("output_norm.weight", (e,), "f32", "output_norm", None, quantizable=False),
    ]

    def add(layer: int, role: str, shape: tuple[int, ...], active: float = 1.0) -> None:
        norm = role.endswith("norm")
        tensors.append(
            Tensor(f"blk.{layer}.{role}.weight", shape, "f32" if norm else "bf16", role, layer,
                   active, quantizable=not norm)
        )  # fmt: skip

    for i in range(n_layer):
        add(i, "attn_norm", (e,))
        add(i, "attn_q_a", (e, 1536))
        add(i, "attn_q_b", (1536, 24576))
        add(i, "attn_kv_a_mqa", (e, 576))
        add(i, "attn_k_b", (128, 512, 128))
        add(i, "attn_v_b", (512, 128, 128))
        add(i, "attn_output", (16384, e))
        if i < 3:
            for role, shape in (("up", (e, 18432)), ("gate", (e, 18432)), ("down", (18432, e))):
                add(i, f"ffn_{role}", shape)
        else:
            for role, shape in (("up", (e, 2048)), ("gate", (e, 2048)), ("down", (2048, e))):
                add(i, f"ffn_{role}_exps", (*shape, x), 8 / 256)
                add(i, f"ffn_{role}_shexp", shape)
    hparams = HParams(
        n_layer=n_layer, n_embd=e, n_vocab=129280, n_head=128, n_head_kv=1, head_dim_k=192,
        head_dim_v=128, n_expert=x, n_expert_used=8, n_expert_shared=1, kv_lora_rank=512,
        q_lora_rank=1536, n_dense_lead=3,
    )  # fmt: skip
    return Model("deepseek-r1", "deepseek2", "split", hparams, tuple(tensors))


def test_q8_0_is_the_best_of_the_default_palette_and_nothing_ties() -> None:
    """Every tensor prefers q8_0, and no two types of the palette cost the same."""
    model = r1_like(8)
    types = default_palette("ik")
    cells = loss.load(model).damage(model, types)
    rows = np.array([t.quantizable for t in model.tensors])
    assert types[int(cells[rows][0].argmin())].name == "q8_0"
    assert all(len(set(row)) == len(types) for row in cells[rows])
    assert not cells[~rows].any()


def test_uniform_model_sums_to_the_whole_model_curve() -> None:
    """The sum over all tensors at one type is the whole-model damage at that type."""
    model = r1_like()
    loss_model = loss.load(model)
    cells = loss_model.damage(model, [get("iq4_k"), get("iq2_kt")])
    ratio = cells[:, 1].sum() / cells[:, 0].sum()
    assert np.isclose(ratio, curve.gain(get("iq2_kt")).gain)


def test_quality_is_the_exact_sum_of_cells() -> None:
    """`quality.damage` is the float sum of the damage cells in tensor order."""
    model = r1_like(6)
    q = get("iq3_k")
    loss_model = loss.load(model)
    cells = loss_model.damage(model, [q])
    total = 0.0
    for value in cells[:, 0]:
        total += float(value)
    quality = loss_model.quality(model, [q if t.quantizable else None for t in model.tensors])
    assert quality.damage == total
    assert quality.ppl is not None
    assert quality.ppl_low is not None
    assert quality.ppl_high is not None
    assert 3.3490 < quality.ppl_low < quality.ppl < quality.ppl_high


def test_damage_of_r1_is_fast() -> None:
    """A thousand tensors by forty types take less than 20 ms (best of five)."""
    model = r1_like()
    loss_model = loss.load(model)
    types = default_palette("ik")
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        loss_model.damage(model, types)
        best = min(best, time.perf_counter() - start)
    assert best < 0.02


def test_every_type_of_both_engines_has_a_gain_and_interleaved_equal_their_base() -> None:
    """No type is without a number; packing rows changes nothing but for the two real types."""
    for engine in ("ik", "mainline"):
        types = table(engine)  # type: ignore[arg-type]
        for t in types.values():
            g = curve.gain(t)
            assert g.gain >= 0.0
            assert g.low <= g.gain <= g.high
            if t.base != t.name and t.name not in ("iq1_s_r4", "iq1_m_r4"):
                assert g == curve.gain(types[t.base])
