"""Shares of recipes that were solved tensor by tensor."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from quantmix.loss import calibrate, prior, solved
from quantmix.models.model import Model

from .conftest import catalog_model


@pytest.fixture(scope="module")
def model() -> Model:
    """GLM-4.5-Air: 47 layers, a sparse model."""
    return catalog_model("glm-4.5-air")


def _mix(model: Model, low: set[int]) -> list[str | None]:
    return [
        None if not t.quantizable else "iq2_ks" if (t.layer or 0) in low else "iq4_ks"
        for t in model.tensors
    ]


def test_sorted_types_do_not_alternate() -> None:
    """Rising, falling and one bump over the depth count as no alternation; a zigzag does."""
    assert solved.surplus(np.array([1.0, 1, 2, 2, 3, 3, 3, 2, 1, 1])) == 0
    assert solved.surplus(np.array([1.0, 2, 1, 2, 1, 2, 1, 2, 1, 2])) == 7


@pytest.mark.parametrize("n", [28, 32, 48, 61, 94])
def test_the_presets_of_llama_quantize_are_no_solved_recipes(n: int) -> None:
    """First and last eighth and every third layer between: a rule that knows nothing of a model."""
    layers = range(n)
    more = [i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2 for i in layers]
    assert solved.surplus(np.array(more, dtype=np.float64)) > 4
    assert solved.chosen(np.array(more, dtype=np.float64)) == 0.0
    drawn = np.random.default_rng(n).random(n) < 0.4
    assert solved.chosen(drawn.astype(np.float64)) == 1.0


def test_a_few_alternations_count_a_little(model: Model) -> None:
    """The tilt fades in: no single layer switches it on or off."""
    steps = []
    values = np.zeros(58)
    for layer in (5, 9, 16, 20, 27, 30, 36, 41, 47, 50):
        values[layer] = 1.0
        steps.append(solved.chosen(values))
    assert steps[:2] == [0.0, 0.0]
    assert 0.0 < steps[3] < steps[4] < 1.0 == steps[-1]
    assert max(b - a for a, b in itertools.pairwise(steps)) < 0.5


def test_a_mix_by_depth_keeps_its_shares(model: Model) -> None:
    """First and last layers treated better than the middle is what any author does."""
    share = prior.shares(model)
    found = solved.shares(model, share, _mix(model, set(range(5, 40))), 0.6)
    assert np.array_equal(found, share)


def test_alternating_types_move_share_to_what_was_spared(model: Model) -> None:
    """The total of each role stays, low types lose share to high ones, and more with more rho."""
    share = prior.shares(model)
    low = {n for n in range(47) if (n * 7) % 11 < 5}
    mix = _mix(model, low)
    at_low = np.array([q == "iq2_ks" for q in mix])
    sums = [float(solved.shares(model, share, mix, rho)[at_low].sum()) for rho in (0.0, 0.3, 0.6)]
    assert sums[0] == pytest.approx(float(share[at_low].sum()))
    assert sums[0] > sums[1] > sums[2] > 0.4 * sums[0]
    found = solved.shares(model, share, mix, 0.6)
    for role in {t.role for t in model.tensors}:
        mine = np.array([t.role == role for t in model.tensors])
        assert found[mine].sum() == pytest.approx(share[mine].sum())


def test_rho_was_fitted_without_each_model() -> None:
    """It lies inside its grid with every single model left out: no one model makes the effect."""
    doc = json.loads(Path(calibrate.__file__).with_name("params.json").read_text("utf-8"))
    for name in ("", *doc["without"]):
        assert 0.5 <= calibrate.hyper(name).solved < 1.2
