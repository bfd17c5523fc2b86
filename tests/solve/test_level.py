"""One level whose pools are coupled by the last: the price of that pool, and what it proves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.solve import level
from quantmix.solve.bound import usage
from quantmix.solve.exact import Limits
from quantmix.solve.level import bound_at_price, is_coupled, solve_level
from quantmix.solve.problem import FloatArray
from tests.solve.test_pools import EXACT, QUICK, least_cost, owned_pools


def coupled(
    seed: int, n_groups: int = 6, tight: float = 0.6
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return separate pools and a last one, used by all groups the more the less they cost."""
    cost, use, capacity = owned_pools(seed, n_groups)
    rng = np.random.default_rng(seed + 1)
    shared = np.sort(rng.integers(1, 40, (1, n_groups, 3)), axis=2).astype(float)
    least, most = shared.min(axis=2).sum(), shared.max(axis=2).sum()
    last = np.floor(least + tight * (most - least))
    return cost, np.concatenate([use, shared]), np.append(capacity, last)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_coupled_pools_equal_brute_force(seed: int, tight: float) -> None:
    """Small coupled problems get their optimum, a bound below it, and keep to every pool."""
    cost, use, capacity = coupled(seed, tight=tight)
    truth = least_cost(cost, use, capacity)
    found = solve_level(cost, use, capacity, EXACT, 0, memo={})
    assert found.objective == pytest.approx(truth, rel=1e-6, abs=1e-9)
    assert found.lower_bound <= truth + 1e-9
    assert (usage(use, found.choice) <= capacity).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.1))
def test_no_price_overstates_the_bound(seed: int, price: float) -> None:
    """At any price of the last pool the bound stays below the least cost."""
    cost, use, capacity = coupled(seed)
    bound = bound_at_price(cost, use, capacity, price)
    assert np.isfinite(bound)
    assert bound <= least_cost(cost, use, capacity) + 1e-9


def test_a_price_proves_nothing_where_pools_are_mixed() -> None:
    """When a group uses two pools besides the last one, the bound at a price is of no use."""
    cost, use, capacity = coupled(1)
    use[:2, 0] = 1.0
    assert bound_at_price(cost, use, capacity, 0.01) == -np.inf


def test_pools_without_a_limit_change_nothing() -> None:
    """A pool without a limit has price 0 and is told its use; the answer is that of the others."""
    cost, use, capacity = coupled(4)
    alone = solve_level(cost, use, capacity, EXACT, 0)
    wide = np.insert(capacity, 1, np.inf)
    extra = np.insert(use, 1, 5.0, axis=0)
    found = solve_level(cost, extra, wide, EXACT, 0)
    assert found.choice.tolist() == alone.choice.tolist()
    assert found.prices.tolist() == np.insert(alone.prices, 1, 0.0).tolist()
    assert found.used.tolist() == np.insert(alone.used, 1, 5.0 * len(cost)).tolist()
    wide[0] = use[0].min(axis=1).sum() - 2
    short = solve_level(cost, extra, wide, EXACT, 0)
    assert short.status == "infeasible"
    assert short.shortfall.tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]


def test_a_level_without_promise_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that reaches the cutoff ends the level; good prices end it without an LP."""
    cost, use, capacity = coupled(9, n_groups=40)
    best = solve_level(cost, use, capacity, QUICK, 0)
    cutoff = 0.9 * best.lower_bound
    cut = solve_level(cost, use, capacity, QUICK, 3, cutoff)
    assert (cut.status, cut.level, len(cut.choice)) == ("cut", 3, 0)
    assert cutoff <= cut.lower_bound <= best.objective

    def no_lp(*_: object) -> None:
        raise AssertionError("the LP was solved")

    monkeypatch.setattr(level, "prices_by_lp", no_lp)
    hinted = solve_level(cost, use, capacity, QUICK, 3, cutoff, hint=best.prices)
    assert hinted.status == "cut"
    assert cutoff <= hinted.lower_bound <= best.objective
    with pytest.raises(AssertionError, match="LP"):
        solve_level(cost, use, capacity, QUICK, 3, np.inf, hint=best.prices)


def test_a_large_coupled_problem_does_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the groups HiGHS is good for, pools at a price close the gap, thoroughly asked too."""
    cost, use, capacity = coupled(13, n_groups=320)
    assert is_coupled(cost, use, capacity)

    def no_core(*_: object) -> None:
        raise AssertionError("the core of coupled pools was solved")

    monkeypatch.setattr(level, "by_core", no_core)
    quick = solve_level(cost, use, capacity, QUICK, 0)
    found = solve_level(cost, use, capacity, Limits(gap=1e-9, seconds=5.0), 0)
    assert (found.used <= capacity).all()
    assert quick.lower_bound <= found.lower_bound + 1e-9
    assert found.lower_bound <= found.objective <= quick.objective + 1e-9
    assert found.gap < 1e-2


def test_small_or_separate_problems_are_not_called_coupled() -> None:
    """Coupled are many groups that share a limited pool: not few, not separate, not unlimited."""
    cost, use, capacity = coupled(13, n_groups=320)
    assert not is_coupled(cost[:300], use[:, :300], capacity)
    assert not is_coupled(cost, use[:-1], capacity[:-1])
    assert not is_coupled(cost, use, np.append(capacity[:-1], np.inf))
    assert not is_coupled(cost, use, np.full(len(capacity), np.inf))


def test_a_quick_solve_calls_nothing_infeasible_that_fits() -> None:
    """Two mixed pools whose relaxed answer does not round: the only choice is found."""
    cost = np.array([[3.0, 0.0], [2.0, 1.0], [3.0, 1.0]])
    use = np.array(
        [[[1.0, 7.0], [0.0, 6.0], [2.0, 8.0]], [[6.0, 3.0], [8.0, 0.0], [7.0, 3.0]]],
    )
    found = solve_level(cost, use, np.array([13.0, 16.0]), QUICK, 0)
    assert found.choice.tolist() == [0, 1, 0]
