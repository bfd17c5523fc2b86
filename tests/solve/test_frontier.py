"""The sweep over prices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.solve.bound import cheapest, lagrangian, prices_one_pool, usage
from quantmix.solve.frontier import Hull, knee, lower_hull
from quantmix.solve.problem import Problem
from quantmix.solve.solver import solve


def random_problem(seed: int, n_groups: int = 5, n_options: int = 4):
    """Options whose cost falls, roughly, with their use; some are missing."""
    rng = np.random.default_rng(seed)
    use = rng.integers(1, 60, (n_groups, n_options)).astype(float)
    cost = rng.random((n_groups, n_options)) + 10.0 / use
    missing = rng.random(cost.shape) < 0.2
    missing[:, 0] = False
    return np.where(missing, np.inf, cost), use


def all_choices(cost, use):
    """(use, cost) of every combination of allowed options."""
    options = [np.nonzero(np.isfinite(row))[0] for row in cost]
    rows = np.arange(len(cost))
    for combination in itertools.product(*options):
        pick = np.array(combination)
        yield use[rows, pick].sum(), cost[rows, pick].sum()


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_every_point_of_the_sweep_is_the_best_for_what_it_uses(seed):
    """No combination that uses at most as much as a point of the sweep costs less."""
    cost, use = random_problem(seed)
    hull = Hull.of(cost, use)
    everything = list(all_choices(cost, use))
    for step in range(len(hull.used)):
        best = min(c for u, c in everything if u <= hull.used[step])
        assert hull.total[step] == pytest.approx(best, abs=1e-9)


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_sums_belong_to_the_choices(seed):
    """Use and cost of each step are those of the choice it stands for; prices never rise."""
    cost, use = random_problem(seed, 8, 6)
    hull = Hull.of(cost, use)
    rows = np.arange(len(cost))
    for step in range(len(hull.used)):
        choice = hull.choice(step)
        assert hull.used[step] == use[rows, choice].sum()
        assert hull.total[step] == pytest.approx(cost[rows, choice].sum())
    assert (np.diff(hull.price) <= 0).all()
    assert (hull.price > 0).all()


@given(st.integers(0, 10_000), st.floats(0.0, 1.2))
@settings(max_examples=60, deadline=None)
def test_the_bound_is_that_of_the_dual(seed, share):
    """Between two points the sweep gives the same bound as the search for the best price."""
    cost, use = random_problem(seed, 8, 6)
    hull = Hull.of(cost, use)
    capacity = hull.used[0] + share * (hull.used[-1] - hull.used[0])
    price, _ = prices_one_pool(cost, use[None], capacity)
    known = lagrangian(cost, use[None], np.array([capacity]), np.array([price]))
    assert hull.bound(capacity) == pytest.approx(known, abs=1e-9)


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_filled_choices_fit_and_no_upgrade_is_left(seed, share):
    """A filled choice stays within the capacity, above the bound, and takes no further upgrade."""
    cost, use = random_problem(seed, 8, 6)
    hull = Hull.of(cost, use)
    capacity = hull.used[0] + share * (hull.used[-1] - hull.used[0])
    choice = hull.filled(capacity)
    rows = np.arange(len(cost))
    used, total = use[rows, choice].sum(), cost[rows, choice].sum()
    assert used <= capacity
    assert total >= hull.bound(capacity) - 1e-9
    better = (cost < cost[rows, choice][:, None]) & (
        use - use[rows, choice][:, None] <= capacity - used
    )
    assert not better.any()


def test_it_agrees_with_the_solver():
    """At the use of a point, the solver finds the cost of that point."""
    cost, use = random_problem(3, 40, 8)
    hull = Hull.of(cost, use)
    for step in range(0, len(hull.used), 9):
        found = solve(Problem.simple(cost, use[None], np.array([hull.used[step]])))
        assert found.objective == pytest.approx(hull.total[step], rel=1e-9)


def test_a_price_gives_the_cheapest_choice():
    """Between the prices of two steps, the choice of the sweep minimises cost + price · use."""
    cost, use = random_problem(5, 12, 6)
    hull = Hull.of(cost, use)
    for step in range(1, len(hull.price)):
        if hull.price[step] == hull.price[step - 1]:
            continue
        price = np.array([(hull.price[step] + hull.price[step - 1]) / 2])
        assert usage(use[None], cheapest(cost, use[None], price))[0] == hull.used[step]


def test_nothing_fits_below_the_least_use():
    """Below the least use there is no step, no choice, and the bound is infinite."""
    hull = Hull.of(*random_problem(1))
    below = hull.used[0] - 1
    assert hull.last_below(below) is None
    assert hull.filled(below) is None
    assert hull.bound(below) == float("inf")


def test_the_hull_skips_what_is_dominated_or_above_a_chord():
    """Corners lie on the lower convex hull and end at the least cost."""
    use = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    cost = np.array([9.0, 8.5, 3.0, 4.0, 1.0, 1.0])
    assert lower_hull(use, cost) == [0, 2, 4]
    with pytest.raises(ValueError, match="no option"):
        lower_hull(use, np.full(6, np.inf))


def test_spread_keeps_to_its_range():
    """The points chosen lie in the range, ascend, and are no more than asked for."""
    hull = Hull.of(*random_problem(2, 30, 8))
    low, high = hull.used[10], hull.used[60]
    steps = hull.spread(low, high, 12)
    assert 2 < len(steps) <= 12
    assert steps == sorted(set(steps))
    assert low <= hull.used[steps[0]]
    assert hull.used[steps[-1]] <= high
    assert hull.spread(hull.used[-1] + 1, hull.used[-1] + 2, 5) == []


def test_the_knee_is_farthest_below_the_chord():
    """On 1/x over [1, 9] the knee is at 3, where the slope is that of the chord."""
    x = np.linspace(1.0, 9.0, 161)
    assert x[knee(x, 1 / x)] == pytest.approx(3.0, abs=0.05)
    assert knee(np.array([1.0, 2.0]), np.array([2.0, 1.0])) == 0


def test_one_option_per_group_is_a_frontier_of_one_point():
    """Without steps every capacity is answered by the start, or not at all."""
    hull = Hull.of(np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]]))
    assert hull.filled(6.0) is None
    chosen = hull.filled(8.0)
    assert chosen is not None
    assert chosen.tolist() == [0, 0]
    assert hull.bound(8.0) == 3.0
