"""One pool, and several that share no group: exact on small ones, bounds that add up, a memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.solve import pools
from quantmix.solve.bound import total, usage
from quantmix.solve.exact import Limits
from quantmix.solve.pools import (
    Memo,
    by_core,
    by_pools,
    infeasible,
    least_fits,
    owners,
    separately,
    solve_pool,
)
from quantmix.solve.problem import FloatArray

EXACT = Limits(gap=0.0, nodes=100_000)
QUICK = Limits(gap=1e-3, seconds=0.0)


def one_pool(
    seed: int, n_groups: int, n_options: int, share: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return cost, use and capacity of a random pool, dearer options using less."""
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.random((n_groups, n_options)))[:, ::-1].copy()
    use = np.sort(rng.integers(1, 60, (1, n_groups, n_options)), axis=2).astype(float)
    least, most = use.min(axis=2).sum(axis=1), use.max(axis=2).sum(axis=1)
    return cost, use, np.floor(least + share * (most - least))


def owned_pools(
    seed: int, n_groups: int = 6, n_pools: int = 3
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return a random problem in which every group uses one pool only."""
    rng = np.random.default_rng(seed)
    cost, use, _ = one_pool(seed, n_groups, 3, 0.5)
    owner = rng.integers(0, n_pools, n_groups)
    whole = np.zeros((n_pools, n_groups, 3))
    whole[owner, np.arange(n_groups)] = use[0]
    least, most = whole.min(axis=2).sum(axis=1), whole.max(axis=2).sum(axis=1)
    return cost, whole, np.floor(least + rng.random(n_pools) * (most - least))


def least_cost(cost: FloatArray, use: FloatArray, capacity: FloatArray) -> float:
    """Return the least cost of all choices that fit, or inf."""
    rows = np.arange(len(cost))
    every = (np.array(c) for c in itertools.product(range(cost.shape[1]), repeat=len(cost)))
    fitting = (c for c in every if (use[:, rows, c].sum(axis=1) <= capacity).all())
    return min((float(cost[rows, c].sum()) for c in fitting), default=np.inf)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.floats(-0.2, 1.0))
def test_one_pool_equals_brute_force(
    seed: int, n_groups: int, n_options: int, share: float
) -> None:
    """A small pool gets its optimum and a bound below it, and is refused only if nothing fits."""
    cost, use, capacity = one_pool(seed, n_groups, n_options, share)
    truth = least_cost(cost, use, capacity)
    found = solve_pool(cost, use, capacity, EXACT, level=7)
    assert found.level == 7
    if not np.isfinite(truth):
        assert found.status == "infeasible"
        return
    assert found.objective == pytest.approx(truth, rel=1e-6, abs=1e-9)
    assert found.lower_bound <= truth + 1e-9
    assert (found.used <= capacity).all()


def test_a_pool_is_not_closed_once_its_bound_reaches_the_cutoff(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a cutoff no better than the bound any choice does; below it the gap is closed."""
    cost, use, capacity = one_pool(3, 30, 4, 0.5)
    bound = solve_pool(cost, use, capacity, QUICK).lower_bound
    closed: list[float] = []
    true_by_pools = pools.by_pools

    def counted(*args: object) -> object:
        closed.append(1.0)
        return true_by_pools(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pools, "by_pools", counted)
    given_up = solve_pool(cost, use, capacity, EXACT, cutoff=bound * (1 - 1e-9))
    assert not closed
    assert given_up.lower_bound == pytest.approx(bound)
    assert (given_up.used <= capacity).all()
    solve_pool(cost, use, capacity, EXACT, cutoff=bound * (1 + 1e-9))
    assert closed


def test_what_is_missing_is_said_by_pool() -> None:
    """Too small a pool is short by its least use less its capacity, a large one by nothing."""
    cost = np.array([[1.0, 0.0], [1.0, 0.0]])
    use = np.array([[[5.0, 9.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 4.0]]])
    capacity = np.array([2.0, 10.0])
    assert not least_fits(cost, use, capacity)
    assert least_fits(cost, use, np.array([5.0, 3.0]))
    found = infeasible(cost, use, capacity, level=4)
    assert (found.status, found.level) == ("infeasible", 4)
    assert found.shortfall.tolist() == [3.0, 0.0]


def test_options_that_are_not_allowed_do_not_count() -> None:
    """The use of an option of infinite cost neither makes an owner nor lowers the least use."""
    cost = np.array([[1.0, np.inf], [1.0, 0.5]])
    use = np.array([[[5.0, 1.0], [0.0, 0.0]], [[0.0, 8.0], [3.0, 4.0]]])
    owner = owners(cost, use)
    assert owner is not None
    assert owner.tolist() == [0, 1]
    assert not least_fits(cost, use, np.array([4.0, 10.0]))


def test_a_group_of_two_pools_has_no_owner() -> None:
    """Pools are not separate as soon as a single group may use two of them."""
    cost = np.zeros((2, 2))
    use = np.array([[[5.0, 0.0], [1.0, 2.0]], [[0.0, 5.0], [0.0, 0.0]]])
    assert owners(cost, use) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_separate_pools_equal_brute_force(seed: int) -> None:
    """Answers and bounds of separate pools add up to those of the whole."""
    cost, use, capacity = owned_pools(seed)
    owner = owners(cost, use)
    assert owner is not None
    found = separately(cost, use, capacity, owner, EXACT, 2)
    assert found.level == 2
    assert found.objective == pytest.approx(least_cost(cost, use, capacity), rel=1e-6, abs=1e-9)
    assert found.lower_bound <= found.objective + 1e-9
    assert (usage(use, found.choice) <= capacity).all()
    each = [
        solve_pool(cost[owner == p], use[[p]][:, owner == p], capacity[[p]], EXACT)
        for p in range(len(capacity))
        if (owner == p).any()
    ]
    assert found.objective == pytest.approx(sum(s.objective for s in each))


def test_one_short_pool_makes_all_infeasible() -> None:
    """The shortfall names the pool that is short, also one below zero that no group uses."""
    cost, use, capacity = owned_pools(1, n_groups=8)
    owner = owners(cost, use)
    assert owner is not None
    assert set(owner) == {0, 1, 2}
    capacity[1] = use[1].min(axis=1).sum() - 4
    found = separately(cost, use, capacity, owner, QUICK, 0)
    assert found.status == "infeasible"
    assert found.shortfall.tolist() == [0.0, 4.0, 0.0]
    unused = np.concatenate([use, np.zeros((1, *use.shape[1:]))])
    capacity[1] += 4
    found = separately(cost, unused, np.append(capacity, -6.0), owner, QUICK, 0)
    assert found.status == "infeasible"
    assert found.shortfall.tolist() == [0.0, 0.0, 0.0, 6.0]


def test_separate_pools_stop_at_the_cutoff() -> None:
    """A bound that reaches the cutoff comes back at once, and still is a bound."""
    cost, use, capacity = owned_pools(5, n_groups=30)
    owner = owners(cost, use)
    assert owner is not None
    best = separately(cost, use, capacity, owner, EXACT, 0)
    memo: Memo = {}
    found = separately(cost, use, capacity, owner, EXACT, 0, 0.5 * best.lower_bound, memo)
    assert 0.5 * best.lower_bound <= found.lower_bound <= best.objective
    assert all(limits == pools.ROUGH for limits, _ in memo.values())


def test_a_pool_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Related problems solve only pools that changed, unless more is asked than was found."""
    cost, use, capacity = owned_pools(2, n_groups=40)
    owner = owners(cost, use)
    assert owner is not None
    asked: list[float] = []
    true_solve = pools.solve_pool

    def counted(*args: object) -> object:
        asked.append(float(args[2][0]))  # type: ignore[index]
        return true_solve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pools, "solve_pool", counted)
    memo: Memo = {}
    first = separately(cost, use, capacity, owner, QUICK, 0, memo=memo)
    assert asked == capacity.tolist()
    asked.clear()
    again = separately(cost, use, capacity, owner, QUICK, 0, memo=memo)
    assert not asked
    assert again.choice.tolist() == first.choice.tolist()
    changed = capacity + np.array([0.0, -1.0, 0.0])
    separately(cost, use, changed, owner, QUICK, 0, memo=memo)
    assert asked == [changed[1]]
    asked.clear()
    rough = Limits(gap=0.5, seconds=0.0)
    separately(cost, use, capacity, owner, rough, 0, memo=memo)
    assert not asked
    hard = Limits(gap=1e-12, seconds=0.0)
    separately(cost, use, capacity, owner, hard, 0, memo=memo)
    assert asked


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([QUICK, EXACT]))
def test_improving_never_harms(seed: int, limits: Limits) -> None:
    """Pool by pool or by the core, a choice that fits gets no worse and still fits."""
    rng = np.random.default_rng(seed)
    cost, _, _ = one_pool(seed, 6, 3, 0.5)
    use = np.sort(rng.integers(1, 60, (2, 6, 3)), axis=2).astype(float)
    start = np.zeros(6, dtype=np.int64)  # the least use of every group
    capacity = np.floor(usage(use, start) * rng.uniform(1.0, 2.0, 2))
    prices = np.full(2, 1e-3)
    truth = least_cost(cost, use, capacity)
    better = by_pools(cost, use, capacity, start, prices, 0.0, limits)
    assert truth - 1e-9 <= total(cost, better) <= total(cost, start)
    assert (usage(use, better) <= capacity).all()
    best, bound = by_core(cost, use, capacity, better, prices, 0.0, EXACT)
    assert bound - 1e-9 <= truth <= total(cost, best) + 1e-9 <= total(cost, better) + 2e-9
    assert (usage(use, best) <= capacity).all()
