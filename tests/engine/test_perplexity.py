"""Perplexity with the real engine: the definition, the invariants, an independent reference."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from reference import Reference, load
from tiny import write_tiny

from quantmix.engine import perplexity
from quantmix.engine.logprobs import BaseReader
from quantmix.engine.session import Session
from quantmix.errors import BadFile, EngineError, UsageError

pytestmark = pytest.mark.engine


def test_equals_an_independent_forward_pass(tiny_f32: Path, text: Path) -> None:
    """PPL of an f32 model equals that of a numpy forward pass on the same chunks to 1e-4."""
    found = perplexity.evaluate(tiny_f32, text, chunks=2, threads=1)
    tokens = np.frombuffer(text.read_bytes().removesuffix(b"\n"), np.uint8)
    ids = tokens.astype(np.int32)
    reference = Reference(load(tiny_f32))
    nll = []
    for chunk in ids[:1024].reshape(2, 512):
        logits = reference.logits(chunk)[256:511]
        norm = np.logaddexp.reduce(logits, axis=1)
        nll.append(norm - logits[np.arange(255), chunk[257:512]])
    mean = float(np.mean(nll))
    assert found.perplexity.tokens == 510
    # The KV cache is f16, which moves single logits by 2e-3; the mean hardly moves.
    assert found.perplexity.ppl == pytest.approx(math.exp(mean), rel=2e-4)


def test_one_sequence_or_four_give_the_same_logits(tiny: Path, text: Path) -> None:
    """Batching chunks changes logits by float noise only, and rows stay with their chunk."""
    with Session(tiny, n_seq=1, threads=1) as one, Session(tiny, n_seq=3, threads=1) as three:
        chunks = one.chunks(one.tokenize(text.read_text()), 3)
        together = three.logits(chunks, 256, 511).copy()
        for i in range(3):
            alone = one.logits(chunks[i : i + 1], 256, 511)[0]
            np.testing.assert_allclose(together[i], alone, atol=2e-3)


def test_bos_replaces_the_first_token_of_a_chunk(tmp_path: Path, text: Path) -> None:
    """Models that add BOS get it at the start of every chunk, others keep their tokens."""
    with_bos = write_tiny(tmp_path / "bos.gguf", add_bos=True)
    with Session(with_bos, threads=1) as session:
        chunks = session.chunks(session.tokenize(text.read_text()))
        assert (chunks[:, 0] == 256).all()
        assert (chunks[:, 1:] < 256).all()


def test_base_side_by_side_or_from_a_file_is_the_same(
    tiny: Path, tiny_imatrix: Path, text: Path, tmp_path: Path
) -> None:
    """KLD from saved base log-probabilities equals KLD with both models loaded."""
    quantized = _quantized(tiny, tmp_path)
    stored = tmp_path / "base.lp"
    first = perplexity.evaluate(quantized, text, base=tiny, logits_base=stored, chunks=2, threads=1)
    second = perplexity.evaluate(quantized, text, logits_base=stored, chunks=2, threads=1)
    assert first.divergence is not None
    assert second.divergence is not None
    assert first.divergence.mean > 1e-5
    assert second.divergence.mean == pytest.approx(first.divergence.mean, rel=1e-6)
    assert BaseReader(stored).info.n_chunk == 2


def _quantized(source: Path, folder: Path) -> Path:
    from mixes import mix_of, recipe_of

    from quantmix.engine.quantize import preflight, quantize
    from quantmix.ggml.weights import open_weights

    mix = mix_of(open_weights(source), lambda role, layer: "q4_K")
    plan = preflight(recipe_of(source, mix), source, folder / "q.gguf")
    return quantize(plan, threads=1).path


def test_a_base_of_another_model_or_text_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Base log-probabilities belong to one model and one text; others are refused by name."""
    stored = tmp_path / "base.lp"
    perplexity.evaluate(tiny, text, base=tiny, logits_base=stored, chunks=2, threads=1)
    other = write_tiny(tmp_path / "other.gguf", seed=9)
    with pytest.raises(BadFile, match="another model"):
        perplexity.evaluate(other, text, logits_base=stored, chunks=2, threads=1)
    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text() + "more")
    with pytest.raises(BadFile, match="another text"):
        perplexity.evaluate(tiny, longer, logits_base=stored, chunks=2, threads=1)
    with pytest.raises(BadFile, match="is not the base of"):
        perplexity.evaluate(tiny, text, base=other, chunks=2, threads=1)


def test_bad_input_is_named(tiny: Path, text: Path, tmp_path: Path) -> None:
    """Short text, no text, a truncated model and NaN weights each give their own error."""
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UsageError, match="at least 1024"):
        perplexity.evaluate(tiny, short, threads=1)
    with pytest.raises(BadFile, match="not a text"):
        perplexity.evaluate(tiny, tiny, threads=1)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-5000])
    with pytest.raises(BadFile):
        perplexity.evaluate(cut, text, threads=1)
    broken = write_tiny(tmp_path / "nan.gguf", nan=True)
    with pytest.raises(EngineError, match="NaN"):
        perplexity.evaluate(broken, text, chunks=2, threads=1)
