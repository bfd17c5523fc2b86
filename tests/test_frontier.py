"""The frontier of a model: points, published mixes, the command."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import typer
from typer.testing import CliRunner

from quantmix import Budget
from quantmix.cli import frontier as command
from quantmix.design import run
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.frontier import Sweep, frontier, parse_bound, sweep
from quantmix.models.sources import load_model
from quantmix.options import Options
from quantmix.palette import TypeLimits
from quantmix.units import GIB

MODEL = "deepseek-v2-lite"


@pytest.fixture(scope="module")
def swept() -> Sweep:
    """The sweep of a small expert model with published mixes."""
    return sweep(load_model(MODEL))


def test_points_ascend_in_size_and_fall_in_damage(swept):
    """Along the frontier size and quality only grow, and each point is proven best."""
    points = frontier(swept, n_points=25).points
    assert len(points) > 15
    for a, b in pairwise(points):
        assert a.tensor_bytes < b.tensor_bytes
        assert a.quality.damage > b.quality.damage
        assert a.quality.ln_ppl_ratio > b.quality.ln_ppl_ratio
        assert a.price >= b.price
    for p in points:
        assert p.lower_bound == pytest.approx(p.quality.damage)
        assert sum(p.types.values()) == p.tensor_bytes
        assert p.bpw == pytest.approx(8 * p.tensor_bytes / swept.model.n_elements)


def test_a_design_of_that_size_finds_no_better_mix(swept):
    """The design for the bytes of a point has the damage of the point."""
    for p in frontier(swept, n_points=6).points[1:5]:
        budget = Budget.from_size(str(p.file_bytes))
        damage = run(swept.model, budget, Options()).recipe.quality.damage
        assert damage == pytest.approx(p.quality.damage, rel=2e-4)


def test_one_device_of_the_memory_named_holds_it(swept):
    """On one device with the memory of a point, a design is at least as good as the point."""
    for p in frontier(swept, n_points=5).points[1:4]:
        recipe = run(swept.model, Budget.from_vram(p.vram_bytes), Options()).recipe
        assert recipe.quality.damage <= p.quality.damage * (1 + 2e-4)


def test_any_size_is_answered(swept):
    """Between two points the best mix found fits, close above the proven bound."""
    for share in (0.1, 0.35, 0.6, 0.9):
        size = int(swept.smallest_bytes + share * (swept.largest_bytes - swept.smallest_bytes))
        p = swept.at(size)
        assert p.tensor_bytes <= size
        assert p.lower_bound <= p.quality.damage <= 1.02 * p.lower_bound
    assert swept.at(swept.smallest_bytes - 1) is None


def test_published_mixes_carry_their_source(swept):
    """Every published mix has a size, a source, its rise, and what the frontier promises there."""
    result = frontier(swept, n_points=5)
    assert len(result.published) > 5
    for mark in result.published:
        assert mark.row.source
        assert mark.tensor_bytes > 0
        base = result.points[0].quality.ppl_base
        assert mark.ln_ppl_ratio == pytest.approx(math.log(mark.row.ppl / base))
        if mark.predicted_here is not None:
            assert mark.predicted_here.tensor_bytes <= mark.tensor_bytes


def test_ranges_are_honoured(swept):
    """Points lie between the two sizes; a range below the smallest mix is infeasible."""
    low, high = 6 * GIB, 9 * GIB
    points = frontier(swept, low, high, 10).points
    assert all(low <= p.tensor_bytes <= high for p in points)
    assert len(points) == 10
    with pytest.raises(InfeasibleBudget, match="smallest mix"):
        frontier(swept, 1, 2, 5)
    with pytest.raises(InfeasibleBudget, match="smallest mix"):
        frontier(swept, None, swept.smallest_bytes - 1, 5)
    with pytest.raises(UsageError, match="swap them"):
        frontier(swept, high, low)
    with pytest.raises(UsageError, match="at least 2"):
        frontier(swept, low, high, 1)


def test_the_curve_starts_where_a_model_is_of_use(swept):
    """Without a lower end, the first point does at most 0.7 nats of damage, if any does more."""
    fragile = sweep(load_model("gemma-3-270m-it"))
    first = frontier(fragile, n_points=5).points[0]
    assert fragile.on_hull(0).quality.damage > 0.7
    assert 0.5 < first.quality.damage <= 0.7
    assert frontier(swept, n_points=5).points[0].tensor_bytes == swept.useful_bytes


def test_a_range_without_a_point_shows_the_one_below(swept):
    """Between two neighbours there is no point of the sweep: the lower one is shown."""
    size = int(swept.hull.used[40]) + 1
    (point,) = frontier(swept, size, size, 5).points
    assert point.tensor_bytes == size - 1


def test_limits_restrict_the_types():
    """Only the types asked for appear, and fewer types are never better."""
    model = load_model(MODEL)
    few = sweep(model, limits=TypeLimits(types=("q8_0", "q4_K", "q2_K")))
    names = {t for p in frontier(few, n_points=8).points for t in p.types}
    assert {"q4_K", "q2_K"} <= names
    assert not any(t.startswith("iq") and t != "iq4_nl" for t in names)
    size = 8 * GIB
    assert few.at(size).quality.damage >= sweep(model).at(size).lower_bound


def test_bounds_are_sizes_or_bits_per_weight():
    """130G and 2.5bpw are bounds, words are not."""
    model = load_model(MODEL)
    assert parse_bound(None, "--from", model) is None
    assert parse_bound("130G", "--from", model) == 130 * GIB
    assert parse_bound("2.5bpw", "--to", model) == math.floor(2.5 * model.n_elements / 8)
    with pytest.raises(UsageError, match="--to"):
        parse_bound("much", "--to", model)


def test_the_command_prints_one_document(tmp_path):
    """stdout holds the JSON and nothing else; the plot is written, the same every time."""
    app = typer.Typer()
    command.register(app)
    plot, again = tmp_path / "a.svg", tmp_path / "b.svg"
    call = [MODEL, "--from", "3bpw", "--to", "5bpw", "--points", "6", "--json"]
    found = CliRunner().invoke(app, [*call, "--plot", str(plot)])
    assert found.exit_code == 0
    doc = json.loads(found.stdout)
    assert len(doc["points"]) == 6
    assert 0 <= doc["knee"] < 6
    assert all(3 <= p["bpw"] <= 5 for p in doc["points"])
    assert "knee" in found.stderr
    CliRunner().invoke(app, [*call, "--plot", str(again), "--quiet"])
    assert plot.read_bytes() == again.read_bytes()
    assert b"<svg" in plot.read_bytes()
    wrong = CliRunner().invoke(app, [*call, "--plot", str(tmp_path / "a.gif")])
    assert wrong.exit_code == 2


def test_one_type_is_a_frontier_of_one_point():
    """With published mixes above its size, which the one mix is compared with."""
    one = sweep(load_model("deepseek-r1"), limits=TypeLimits(types=("q8_0",)))
    result = frontier(one)
    assert [p.tensor_bytes for p in result.points] == [one.smallest_bytes]
    assert any(m.predicted_here for m in result.published)
