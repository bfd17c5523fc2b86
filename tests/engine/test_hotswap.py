"""Hot swap against really quantized files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mixes import mix_of, recipe_of

from quantmix import measure, measurements
from quantmix.engine.perplexity import evaluate
from quantmix.engine.quantize import preflight, quantize
from quantmix.ggml import types
from quantmix.ggml.weights import open_weights

pytestmark = pytest.mark.engine

# Role and type, 2 to 5 bits; those of 1.5 bits build tables for many seconds and come below.
PAIRS = [
    ("ffn_down", "iq2_xxs"),
    ("ffn_up", "iq2_k_r4"),
    ("attn_q", "q2_K"),
    ("attn_v", "iq2_k"),
    ("ffn_gate", "iq2_ks"),
    ("token_embd", "iq2_kl"),
    ("attn_k", "iq3_ks"),
    ("ffn_down", "iq3_k"),
    ("ffn_up", "q3_K"),
    ("attn_v", "iq4_ks"),
    ("attn_k", "q4_K"),
    ("token_embd", "iq4_k"),
    ("ffn_gate", "iq4_nl"),
    ("attn_output", "iq5_ks"),
]

REAL_PAIRS = [
    ("attn_k", "iq1_s_r4"),
    ("attn_k", "iq2_ks"),
    ("attn_k", "iq2_xs"),
    ("attn_q", "iq2_kl"),
    ("attn_q", "q3_K"),
    ("attn_v", "q2_K"),
    ("attn_v", "iq3_xxs"),
    ("attn_output", "iq3_ks"),
    ("attn_output", "iq4_nl"),
    ("ffn_gate", "q4_K"),
    ("ffn_down", "q5_0"),
    ("ffn_up", "iq4_ks"),
    ("token_embd", "q4_K"),
]


def _by_file(
    source: Path, imatrix: Path, role: str, kind: str, text: Path, out: Path, chunks: int = 2
) -> float:
    """KLD of a file in which only `role` is quantized."""
    mix = mix_of(open_weights(source), lambda r, _: kind if r == role else None)
    plan = preflight(recipe_of(source, mix), source, out, imatrix=imatrix)
    made = quantize(plan).path
    stored = out.with_name("base.lp")
    found = evaluate(made, text, base=source, logits_base=stored, chunks=chunks)
    made.unlink()
    assert found.divergence is not None
    return found.divergence.mean


def _by_swap(
    source: Path,
    imatrix: Path,
    pairs: list[tuple[str, str]],
    text: Path,
    out: Path,
    chunks: int = 2,
) -> dict[tuple[str, str], float]:
    weights = open_weights(source)
    groups = tuple(
        g for role, kind in pairs for g in measure.groups_of(weights, "role", [kind], roles=[role])
    )
    run = measure.Run(source, text, imatrix, groups, {}, chunks=chunks)
    return {(p.role, p.type): p.kld for p in measure.measure(run, out).probes}


def test_tiny_model_every_family(
    tiny: Path, tiny_imatrix: Path, text: Path, tmp_path: Path
) -> None:
    """For 14 role and type pairs the swapped model's KLD is the quantized file's, to 0.1%."""
    swapped = _by_swap(tiny, tiny_imatrix, PAIRS, text, tmp_path / "m.json")
    assert set(swapped) == set(PAIRS)
    for (role, kind), kld in swapped.items():
        written = _by_file(tiny, tiny_imatrix, role, kind, text, tmp_path / "q.gguf")
        assert kld == pytest.approx(written, rel=1e-3, abs=2e-7), (role, kind)


@pytest.mark.slow
def test_real_model(demo: Path, tmp_path: Path) -> None:
    """On SmolLM2, 13 pairs from 1.5 to 5.5 bits: the swapped KLD is the file's within 5%."""
    from quantmix.engine.imatrix import collect
    from quantmix.texts import text

    imatrix = tmp_path / "demo.dat"
    collect(demo, text("imatrix"), imatrix, chunks=4)
    swapped = _by_swap(demo, imatrix, REAL_PAIRS, text("probe"), tmp_path / "m.json", chunks=1)
    assert set(swapped) == set(REAL_PAIRS)
    for (role, kind), kld in swapped.items():
        out = tmp_path / "q.gguf"
        written = _by_file(demo, imatrix, role, kind, text("probe"), out, chunks=1)
        assert kld == pytest.approx(written, rel=0.05), (role, kind)


def test_bytes_are_those_of_the_file(tiny: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """Quantizing in-process gives the very bytes that llama-quantize writes."""
    from quantmix.engine.hotswap import Quantizer
    from quantmix.ggml import imatrix as imatrices

    kinds = ["iq2_xxs", "iq2_kl", "iq3_ks", "q4_K", "iq4_k", "q6_0"]
    names = ["ffn_down", "ffn_up", "ffn_gate", "attn_q", "attn_output", "attn_v"]
    by_role = dict(zip(names, kinds, strict=True))
    source = open_weights(tiny)
    mix = mix_of(source, lambda role, _: by_role.get(role))
    plan = preflight(recipe_of(tiny, mix), tiny, tmp_path / "q.gguf", imatrix=tiny_imatrix)
    written = open_weights(quantize(plan, threads=1).path)
    quantizer = Quantizer(source, imatrices.read(tiny_imatrix), threads=1)
    for role, kind in by_role.items():
        name = f"blk.1.{role}.weight"
        made = quantizer.quantize(name, kind)
        assert made.type == types.get(kind)
        np.testing.assert_array_equal(made.data, np.frombuffer(written.read(name), np.uint8))


def test_weighted_error_is_what_the_formula_says(tiny: Path) -> None:
    """Without an imatrix the error is the plain relative squared error of the decoded weights."""
    from quantmix.engine.hotswap import Quantizer

    weights = open_weights(tiny)
    quantizer = Quantizer(weights, None, threads=2)
    name = "blk.0.ffn_down.weight"
    made = quantizer.quantize(name, "q8_0")
    x = quantizer.source(name).astype(np.float64)
    blocks = made.data.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    back = (scale * blocks[:, 2:].view(np.int8)).reshape(x.shape)
    assert made.error == pytest.approx(((x - back) ** 2).sum() / (x**2).sum(), rel=1e-5)
    assert quantizer.quantize(name, "q4_0").error > 50 * made.error


def test_results_can_be_loaded(tiny: Path, tiny_imatrix: Path, text: Path, tmp_path: Path) -> None:
    """What `measure` writes, `measurements.load` reads back with every field."""
    out = tmp_path / "m.json"
    _by_swap(tiny, tiny_imatrix, [("attn_q", "q4_K")], text, out)
    loaded = measurements.load(out)
    assert loaded.tokens == 510
    assert loaded.noise_floor < 1e-6
    (probe,) = loaded.probes
    assert probe.kld > 10 * loaded.noise_floor
    assert probe.n_elements == 2 * 256 * 256
    assert 0 < probe.err < 0.02


def test_experts(tiny_moe: Path, text: Path, tmp_path: Path) -> None:
    """Expert tensors too, though up and gate then differ in type and are no longer fused."""
    from quantmix.engine.imatrix import collect

    imatrix = tmp_path / "moe.dat"
    collect(tiny_moe, text, imatrix, threads=1)
    pairs = [("ffn_up_exps", "iq3_k"), ("ffn_down_exps", "iq2_k")]
    swapped = _by_swap(tiny_moe, imatrix, pairs, text, tmp_path / "m.json")
    for (role, kind), kld in swapped.items():
        written = _by_file(tiny_moe, imatrix, role, kind, text, tmp_path / "q.gguf")
        assert kld == pytest.approx(written, rel=1e-3, abs=2e-7), (role, kind)


def test_what_was_in_the_model_before_leaves_no_trace(
    tiny: Path, tiny_imatrix: Path, text: Path, tmp_path: Path
) -> None:
    """Up and gate fused in one layer, then in the other: as many nodes in the graph, but others."""
    weights = open_weights(tiny)

    def mix(first: str, second: str) -> dict[str, str]:
        gates = {"blk.0.ffn_gate.weight": first, "blk.1.ffn_gate.weight": second}
        return {**gates, "blk.0.ffn_up.weight": "q3_K", "blk.1.ffn_up.weight": "q4_K"}

    groups = measure.groups_of(weights, "role", ["q3_K"], roles=["ffn_gate"])
    found = [
        measure.measure(
            measure.Run(tiny, text, tiny_imatrix, groups, around, chunks=2, threads=1),
            tmp_path / f"{name}.json",
        )
        for name, around in (("other", mix("q2_K", "q4_K")), ("same", mix("q3_K", "q3_K")))
    ]
    assert not found[0].failed
    assert found[0].probes[0].kld == pytest.approx(found[1].around_kld, rel=1e-6)
    assert found[0].around_kld != pytest.approx(found[1].around_kld, rel=1e-2)
