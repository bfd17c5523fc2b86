"""Splits of the layers: their bounds against all placements of a small model, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import quantmix as qm
from quantmix.budget import Budget
from quantmix.loss import load as load_loss
from quantmix.memory.model import Placement
from quantmix.models.model import Model
from quantmix.palette import TypeLimits, build
from quantmix.search import timing
from quantmix.search.base import QUICK, Goals
from quantmix.search.planner import _Search
from quantmix.search.splits import Splits

N_LAYERS = 5


def small_model() -> Model:
    """The first layers of a mixture of experts."""
    whole = qm.load_model("qwen3-30b-a3b")
    tensors = tuple(t for t in whole.tensors if t.layer is None or t.layer < N_LAYERS)
    return replace(whole, hparams=replace(whole.hparams, n_layer=N_LAYERS), tensors=tensors)


def small_search(gpus: str, ram: str, engine: str, min_tps: float | None) -> _Search:
    model = small_model()
    budget = Budget.from_gpus(gpus, ram=ram, cpu="desktop-ddr5-6000-2ch", engine=engine, ctx=4096)
    assert budget.rig is not None
    speeds = (1000.0, 300.0)  # GB/s: no card is like another
    gpus_there = zip(budget.rig.gpus, speeds, strict=False)
    rig = replace(
        budget.rig, gpus=tuple(replace(g, bandwidth_gbs=speed) for g, speed in gpus_there)
    )
    limits = TypeLimits(types=("q8_0", "q6_K", "q4_K", "q3_K", "q2_K", "iq3_xxs"))
    palette = build(model, load_loss(model, engine=engine), engine, limits)
    times = timing.of(model, palette, rig, budget.settings, min_tps)
    return _Search(model, palette, rig, budget.settings, times, Goals())


def every_placement(search: _Search) -> Iterator[tuple[int, Placement]]:
    """All contiguous splits with all sets of layers' experts in RAM, with their slots in RAM."""
    n_gpus = len(search.rig.gpus)
    for slots in search._host_counts():
        none = search._placement(search._even_weights(), slots)
        n_host = none.layer_device.count(-1)
        for ends in combinations(range(n_host + 1, N_LAYERS), n_gpus - 1):
            cuts = [n_host, *ends, N_LAYERS]
            on_gpu = [g for g in range(n_gpus) for _ in range(cuts[g + 1] - cuts[g])]
            split = replace(none, layer_device=(*none.layer_device[:n_host], *on_gpu))
            layers = range(n_host, N_LAYERS)
            for n in range(len(layers) + 1):
                for moved in combinations(layers, n):
                    yield slots, replace(split, cpu_experts=frozenset(moved))


@pytest.mark.parametrize("engine", ["ik", "mainline"])
@pytest.mark.parametrize(
    ("gpus", "ram", "min_tps"),
    [("1x2GiB", "7G", None), ("1GiB,2GiB", "5500MiB", None), ("1GiB,2GiB", "5500MiB", 150.0)],
)
def test_no_placement_does_less_damage_than_the_bound(
    gpus: str, ram: str, engine: str, min_tps: float | None
) -> None:
    """All placements of a small model: none below its number's bound, the best nearly found."""
    search = small_search(gpus, ram, engine, min_tps)
    layers = search._layers()
    bounds = layers.least_damage(search.timing.wanted)
    before = bounds.best.copy()
    splits = Splits(bounds, search.model, search.rig, search.settings)
    for z, c in np.ndindex(before.shape):
        splits.look(z, c)
    assert (bounds.best >= before).all()
    assert len(search.rig.gpus) == 1 or bounds.best.min() > before.min()
    best = np.inf
    for slots, placement in every_placement(search):
        tried = search._solve(placement, QUICK)
        if tried.fits:
            best = min(best, tried.solution.objective)
            lower = bounds.lower[list(layers.slots).index(slots)]
            assert tried.solution.objective >= lower * (1 - 1e-9), placement
    found = search._least_damage(
        layers.least_damage(search.timing.wanted), search._possible(layers)
    )
    assert np.isfinite(best)
    assert found.solution.objective <= best * 1.02
