"""Layers per GPU by `-ts`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.errors import UsageError
from quantmix.memory.model import HOST
from quantmix.memory.split import by_count, gpu_slots, homes_by_count

SHARES = st.lists(st.integers(0, 50), min_size=1, max_size=16).filter(lambda x: sum(x) > 0)


def counts(homes: tuple[int, ...], n_gpus: int) -> list[int]:
    """Layers on each GPU."""
    return [homes.count(i) for i in range(n_gpus)]


def test_fifteen_gpus_of_log_l011() -> None:
    """R1 over 15 GPUs put 6, 4, …, 4, 3 layers on them, as its cache per GPU shows."""
    ts = [37, 25, 25, 25, 24.5, 24, 24, 24, 24, 25, 24, 25, 24, 24.5, 31]
    homes = homes_by_count(ts, 61, 62, "ik")
    assert counts(homes, 15) == [6] + [4] * 13 + [3]
    assert by_count(ts, 0, 62)[-1] == 14


def test_ngl_means_other_layers_in_each_engine() -> None:
    """With -ngl 61 of 61 layers ik leaves the output in RAM, mainline layer 0."""
    assert gpu_slots(61, 61, "ik") == (0, 61)
    assert gpu_slots(61, 61, "mainline") == (1, 62)
    assert homes_by_count([1], 61, 61, "mainline")[0] == HOST
    assert homes_by_count([1], 61, 0, "mainline") == homes_by_count([1], 61, 0, "ik")


def test_the_first_layers_stay_in_ram() -> None:
    """80 layers with -ngl 62 leave 18 of them in RAM (log L233)."""
    homes = homes_by_count([12, 26, 31, 31], 80, 62, "ik")
    assert homes.count(HOST) == 18
    assert homes[:18] == (HOST,) * 18


@given(ts=SHARES, n_layer=st.integers(1, 130), engine=st.sampled_from(["ik", "mainline"]))
def test_every_layer_lands_once_and_in_order(ts: list[int], n_layer: int, engine: str) -> None:
    """GPUs are filled in order, none without a share, each within one layer of its share."""
    homes = homes_by_count(ts, n_layer, 999, engine)  # type: ignore[arg-type]
    assert list(homes) == sorted(homes)
    assert all(ts[home] > 0 for home in homes)
    output = by_count(ts, 0, n_layer + 1)[-1]
    for i, share in enumerate(ts):
        mine = homes.count(i) + (output == i)
        assert abs(mine - (n_layer + 1) * share / sum(ts)) <= 1


def test_shares_that_make_no_split_are_refused() -> None:
    """No, negative or only zero shares are errors."""
    for ts in ([], [0, 0], [-1, 2]):
        with pytest.raises(UsageError, match="shares"):
            homes_by_count(ts, 10, 99, "ik")
