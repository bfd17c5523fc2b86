"""The arithmetic of perplexity and KL divergence."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.engine import scores
from quantmix.errors import EngineError


def _pair(seed: int, noise: float, n: int = 20, vocab: int = 701, scale: float = 4.0):
    rng = np.random.default_rng(seed)
    base = (rng.standard_normal((n, vocab)) * scale).astype(np.float32)
    other = base + (rng.standard_normal((n, vocab)) * noise).astype(np.float32)
    return base, other, rng.integers(0, vocab, n).astype(np.int32)


def _exact(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    a, b = base.astype(np.float64), other.astype(np.float64)
    a -= np.logaddexp.reduce(a, axis=1, keepdims=True)
    b -= np.logaddexp.reduce(b, axis=1, keepdims=True)
    return (np.exp(a) * (a - b)).sum(axis=1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.003, 2.0), st.floats(0.5, 12.0))
def test_kld_equals_double_precision(seed: int, noise: float, scale: float) -> None:
    """KLD through 16-bit log-probabilities agrees with float64 to 1e-5 nats plus 0.1%."""
    base, other, targets = _pair(seed, noise, scale=scale)
    found = scores.compare(other, targets, scores.encode(base, targets))
    assert found.kld is not None
    np.testing.assert_allclose(found.kld, _exact(base, other), rtol=1e-3, atol=2e-5)


def test_a_model_has_no_divergence_from_itself() -> None:
    """Comparing a model with its own base gives zero, equal nll and equal top tokens."""
    base, _, targets = _pair(1, 0.0)
    found = scores.compare(base, targets, scores.encode(base, targets))
    assert found.divergence().mean == pytest.approx(0, abs=1e-6)
    assert found.divergence().same_top == 1
    assert found.log_ratio().mean == pytest.approx(0, abs=1e-6)


def test_threads_change_nothing() -> None:
    """Scores are the same with and without a thread pool."""
    base, other, targets = _pair(2, 0.5, n=50)
    with ThreadPoolExecutor(3) as pool:
        rows = scores.encode(base, targets, pool)
        threaded = scores.compare(other, targets, rows, pool)
    alone = scores.compare(other, targets, scores.encode(base, targets))
    np.testing.assert_array_equal(threaded.kld, alone.kld)
    np.testing.assert_array_equal(threaded.nll, alone.nll)


def test_error_of_ppl_is_the_one_the_engines_print() -> None:
    """± is PPL · sqrt(var(nll)/(n-1)) with the population variance, as perplexity.cpp has it."""
    nll = np.array([1.0, 2.0, 4.0, 3.0])
    found = scores.Scores(nll).perplexity()
    mean, square = nll.mean(), (nll**2).mean()
    assert found.ppl == pytest.approx(math.exp(mean))
    assert found.ppl_err == pytest.approx(math.exp(mean) * math.sqrt((square - mean**2) / 3))


def test_nan_is_an_engine_failure() -> None:
    """A model that answers NaN never becomes a number."""
    with pytest.raises(EngineError, match="NaN"):
        scores.Scores(np.array([1.0, np.nan])).perplexity()


def test_paired_ratio_is_far_tighter_than_either_perplexity() -> None:
    """The error of ln(PPL/PPL_base) comes from paired differences."""
    base, other, targets = _pair(3, 0.05, n=400)
    found = scores.compare(other, targets, scores.encode(base, targets))
    assert found.log_ratio().err < 0.1 * found.perplexity().ppl_err / found.perplexity().ppl
