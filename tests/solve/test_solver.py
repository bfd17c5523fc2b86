"""The solver against brute force, its own bound, and its promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.solve.bound import lagrangian
from quantmix.solve.problem import Problem
from quantmix.solve.solver import Limits, solve


def brute_force(problem: Problem) -> float:
    """Return the least cost of any choice that fits, or inf."""
    best = np.inf
    n_groups, n_options = problem.cost.shape
    rows = np.arange(n_groups)
    for z, capacity in zip(problem.levels, problem.capacities, strict=True):
        for choice in itertools.product(range(n_options), repeat=n_groups):
            j = np.array(choice)
            if (problem.level[rows, j] > z).any():
                continue
            if (problem.use[:, rows, j].sum(axis=1) <= capacity).all():
                best = min(best, float(problem.cost[rows, j].sum()))
    return best


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small random problems: 1-3 pools, padded options, sometimes two levels."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    n_groups, n_options = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    n_pools = draw(st.integers(1, 3))
    use = rng.integers(1, 60, (n_pools, n_groups, n_options)).astype(float)
    if n_pools > 1:
        home = rng.integers(0, n_pools, (n_groups, n_options))
        for p in range(n_pools):
            use[p][home != p] = 0
    cost = rng.choice([0.0, 1e-6, 0.5, 1.0], (n_groups, n_options)) * rng.random(
        (n_groups, n_options)
    )
    cost[:, 1:][rng.random((n_groups, n_options - 1)) < 0.2] = np.inf
    use[:, ~np.isfinite(cost)] = 0
    tight = draw(st.floats(0.2, 1.1))
    capacity = np.floor(use.max(axis=2).sum(axis=1) * tight)
    simple = Problem.simple(cost, use, capacity)
    if not draw(st.booleans()):
        return simple
    level = rng.integers(0, 3, cost.shape)
    return Problem(
        groups=simple.groups,
        option=simple.option,
        cost=cost,
        use=use,
        pools=simple.pools,
        capacities=np.stack([capacity, capacity * 0.9, capacity * 0.8]),
        levels=np.arange(3, dtype=np.int64),
        level=level.astype(np.int64),
    )


@settings(max_examples=300, deadline=None)
@given(problems())
def test_solver_equals_brute_force(problem: Problem) -> None:
    """On small instances the answer is the optimum, the bound is below it, and it fits."""
    truth = brute_force(problem)
    found = solve(problem, Limits(gap=0.0, nodes=100_000))
    if not np.isfinite(truth):
        assert found.status == "infeasible"
        return
    rows = np.arange(len(problem.groups))
    assert found.objective == pytest.approx(truth, rel=1e-6, abs=1e-9)
    assert found.lower_bound <= truth + 1e-9
    capacity = problem.capacities[list(problem.levels).index(found.level)]
    assert (problem.use[:, rows, found.choice].sum(axis=1) <= capacity).all()
    assert (problem.level[rows, found.choice] <= found.level).all()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_answer_is_maximal(problem: Problem) -> None:
    """No single change of one group that lowers the cost still fits."""
    found = solve(problem)
    if found.status == "infeasible":
        return
    capacity = problem.capacities[list(problem.levels).index(found.level)]
    rows = np.arange(len(problem.groups))
    left = capacity - found.used
    for g, j in itertools.product(rows, range(problem.cost.shape[1])):
        now = found.choice[g]
        if problem.cost[g, j] < problem.cost[g, now] and problem.level[g, j] <= found.level:
            assert (problem.use[:, g, j] - problem.use[:, g, now] > left).any()


def test_bound_follows_from_the_prices() -> None:
    """The reported bound is at least the Lagrangian value at the reported prices."""
    rng = np.random.default_rng(5)
    base = np.sort(rng.random((40, 8)))[:, ::-1].copy()
    use = np.sort(rng.integers(10, 1000, (1, 40, 8)), axis=2).astype(float)
    problem = Problem.simple(base, use, np.array([use.max(axis=2).sum() * 0.5]))
    found = solve(problem)
    value = lagrangian(problem.cost, problem.use, problem.capacities[0], found.prices)
    assert value * (1 - 1e-12) <= found.lower_bound <= found.objective
    assert value > 0.98 * found.objective
    assert found.gap < 1e-3


def test_damage_falls_as_the_capacity_grows() -> None:
    """A larger pool never gives a worse objective beyond the gap."""
    rng = np.random.default_rng(11)
    cost = np.sort(rng.random((60, 10)))[:, ::-1].copy()
    use = np.sort(rng.integers(10, 1000, (1, 60, 10)), axis=2).astype(float)
    top = use.max(axis=2).sum()
    last = np.inf
    for share in np.linspace(0.2, 1.0, 30):
        found = solve(Problem.simple(cost, use, np.array([top * share])))
        if found.status == "infeasible":
            continue
        assert found.objective <= last * (1 + found.gap + 1e-9)
        last = found.objective


def test_zero_objective_has_no_gap() -> None:
    """When nothing costs anything the gap is zero and the smallest option is taken."""
    use = np.array([[[5.0, 3.0], [2.0, 9.0]]])
    found = solve(Problem.simple(np.zeros((2, 2)), use, np.array([100.0])))
    assert found.gap == 0.0
    assert found.used[0] == 5.0
