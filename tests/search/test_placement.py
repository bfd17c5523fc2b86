"""Contiguous layer splits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quantmix.search.placement import move_boundary, number_ranges, ranges, split_layers


@given(
    st.lists(st.floats(1, 100), min_size=4, max_size=80),
    st.lists(st.floats(1, 100), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_a_split_is_contiguous_and_uses_every_gpu(
    weights: list[float], capacities: list[float], host_layers: int
) -> None:
    """Blocks come in device order after the RAM blocks; with enough blocks no GPU is empty."""
    devices = split_layers(weights, capacities, host_layers=host_layers)
    assert len(devices) == len(weights)
    assert list(devices) == sorted(devices)
    assert devices.count(-1) == host_layers
    if len(weights) - host_layers >= len(capacities):
        assert set(devices) - {-1} == set(range(len(capacities)))


def test_equal_cards_share_equal_layers_evenly() -> None:
    """60 equal layers over 2 equal cards are 30 and 30."""
    assert split_layers([1.0] * 60, [5.0, 5.0]).count(0) == 30


def test_the_output_counts_on_the_last_card() -> None:
    """A heavy output matrix leaves the last card fewer layers."""
    assert split_layers([1.0] * 60, [5.0, 5.0], tail=10.0).count(1) == 25


def test_moving_a_boundary_moves_one_layer() -> None:
    """The block at the boundary changes hands; a card's last block stays."""
    assert move_boundary((0, 0, 1, 1), 0, towards_left=True) == (0, 0, 0, 1)
    assert move_boundary((0, 0, 1, 1), 0, towards_left=False) == (0, 1, 1, 1)
    assert move_boundary((0, 1), 0, towards_left=True) == (0, 1)


def test_ranges_in_words() -> None:
    """Splits and sets of layers read as people write them."""
    assert ranges((-1, 0, 0, 1), ["GPU0", "GPU1", "CPU"]) == "CPU 0, GPU0 1-2, GPU1 3"
    assert number_ranges([3, 4, 5, 9]) == "3-5, 9"
