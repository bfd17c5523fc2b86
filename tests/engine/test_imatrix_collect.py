"""Collecting an importance matrix with the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference import Reference, load

from quantmix.engine.imatrix import collect
from quantmix.ggml import imatrix

pytestmark = pytest.mark.engine


def test_equals_the_inputs_of_an_independent_forward_pass(
    tiny_f32: Path, text: Path, tmp_path: Path
) -> None:
    """Every matrix's mean squares equal those of a numpy forward pass on the same chunks."""
    out = tmp_path / "i.gguf"
    made = collect(tiny_f32, text, out, chunks=2, threads=1)
    assert made.without == ()
    raw = np.frombuffer(text.read_bytes(), np.uint8)[:1024].astype(np.int32)
    reference = Reference(load(tiny_f32))
    for chunk in raw.reshape(2, 512):
        reference.logits(chunk)
    found = imatrix.read(out).entries
    assert found.keys() == reference.inputs.keys()
    for name, inputs in reference.inputs.items():
        want = (np.concatenate(inputs) ** 2).mean(axis=0)
        np.testing.assert_allclose(found[name].means()[0], want, rtol=5e-3, err_msg=name)
        assert found[name].counts.tolist() == [1024]


def test_a_tied_head_gets_an_entry(tiny_imatrix: Path) -> None:
    """The tied matrix has an entry, from what flows into the head."""
    entry = imatrix.read(tiny_imatrix).entries["token_embd.weight"]
    assert entry.sums.shape == (1, 256)
    assert (entry.means() > 0).all()


def test_experts_are_counted_one_by_one(tiny_moe: Path, text: Path, tmp_path: Path) -> None:
    """Each token runs two of four experts: counts add up, and up and gate see the same rows."""
    out = tmp_path / "moe.gguf"
    collect(tiny_moe, text, out, chunks=2, threads=1)
    entries = imatrix.read(out).entries
    for layer in range(2):
        up = entries[f"blk.{layer}.ffn_up_exps.weight"]
        gate = entries[f"blk.{layer}.ffn_gate_exps.weight"]
        down = entries[f"blk.{layer}.ffn_down_exps.weight"]
        assert up.counts.sum() == 2 * 1024
        assert up.sums.shape == (4, 256)
        assert down.sums.shape == (4, 512)
        np.testing.assert_array_equal(up.sums, gate.sums)
        np.testing.assert_array_equal(up.counts, down.counts)
        # Both experts of a token see its one input: all together, twice the layer's input.
        assert len(set(up.counts.tolist())) > 1


def test_counts_per_expert_survive_into_quantization(
    tiny_moe: Path, text: Path, tmp_path: Path
) -> None:
    """llama-quantize takes the matrix of a mixture, converted from GGUF, for types that need it."""
    from mixes import mix_of, recipe_of

    from quantmix.engine.quantize import preflight, quantize
    from quantmix.ggml.weights import open_weights

    out = tmp_path / "moe.gguf"
    collect(tiny_moe, text, out, threads=1)
    mix = mix_of(open_weights(tiny_moe), lambda role, _: "iq2_xxs" if "exps" in role else "q6_K")
    plan = preflight(recipe_of(tiny_moe, mix), tiny_moe, tmp_path / "q.gguf", imatrix=out)
    assert quantize(plan, threads=1).n_tensors == len(mix)
