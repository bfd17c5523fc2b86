"""The response and its derivatives."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantmix.loss import features, response


def _theta(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    theta = rng.normal(0.0, 0.1, response.n_parameters())
    theta[response.BASE], theta[response.SCALE], theta[response.ONSET] = 1.2, -4.0, -0.5
    return theta


def _mixes(seed: int, n: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.random((n, features.N_GROUPS, len(features.columns())))
    return w / w.sum(axis=(1, 2), keepdims=True)


def test_jacobian_equals_finite_differences() -> None:
    """Every derivative agrees with a central difference."""
    theta, w = _theta(1), _mixes(2)
    exact = response.respond(theta, w, 1.1).jacobian
    for j in range(len(theta)):
        step = np.zeros_like(theta)
        step[j] = 1e-6
        up = response.respond(theta + step, w, 1.1).ln_ppl
        down = response.respond(theta - step, w, 1.1).ln_ppl
        assert np.allclose((up - down) / 2e-6, exact[:, j], rtol=1e-5, atol=1e-8)


@given(st.floats(0.0, 5.0), st.floats(-2.0, 1.0), st.floats(0.3, 1.5))
def test_the_whole_is_never_less_than_the_sum(x: float, ln_c: float, power: float) -> None:
    """y ≥ x, and y = 2x where c·x = 1."""
    assert float(response.super_additive(x, ln_c, power)) >= x
    onset = float(np.exp(-ln_c))
    assert np.isclose(float(response.super_additive(onset, ln_c, power)), 2 * onset)
