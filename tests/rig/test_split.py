"""Layers per GPU by `-ts`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.errors import UsageError
from quantmix.memory.model import HOST
from quantmix.rig.split import first_gpu_layer, layers_by_bytes, layers_of, output_home

OLD = "2025-08-01"
SHARES = st.lists(st.integers(0, 50), min_size=1, max_size=16).filter(lambda x: sum(x) > 0)


def counts(homes: tuple[int, ...], n_gpus: int) -> list[int]:
    """Layers on each GPU."""
    return [homes.count(i) for i in range(n_gpus)]


def test_fifteen_gpus_of_log_l011() -> None:
    """R1 over 15 GPUs put 6, 4, …, 4, 3 layers on them, as its cache per GPU shows."""
    ts = [37, 25, 25, 25, 24.5, 24, 24, 24, 24, 25, 24, 25, 24, 24.5, 31]
    homes = layers_of(ts, 61, 62, "ik", "2025-03-01")
    assert counts(homes, 15) == [6] + [4] * 13 + [3]
    assert output_home(ts, 61, 62, "ik", "2025-03-01") == 14


def test_ngl_means_other_layers_in_each_engine() -> None:
    """With -ngl 61 of 61 layers ik leaves the output in RAM, mainline layer 0."""
    assert first_gpu_layer(61, 61, "ik") == 0
    assert first_gpu_layer(61, 61, "mainline") == 1
    assert output_home([1], 61, 61, "ik", OLD) == HOST
    assert output_home([1], 61, 61, "mainline", OLD) == 0
    assert layers_of([1], 61, 61, "mainline", OLD)[0] == HOST


def test_the_first_layers_stay_in_ram() -> None:
    """80 layers with -ngl 62 leave 18 of them in RAM (log L233)."""
    homes = layers_of([12, 26, 31, 31], 80, 62, "ik", OLD)
    assert homes.count(HOST) == 18
    assert homes[:18] == (HOST,) * 18


@given(ts=SHARES, n_layer=st.integers(1, 130), engine=st.sampled_from(["ik", "mainline"]))
def test_every_layer_lands_once_and_in_order(ts: list[int], n_layer: int, engine: str) -> None:
    """GPUs are filled in order, none without a share, each within one layer of its share."""
    homes = layers_of(ts, n_layer, 999, engine, OLD)  # type: ignore[arg-type]
    assert list(homes) == sorted(homes)
    assert all(ts[home] > 0 for home in homes)
    output = output_home(ts, n_layer, 999, engine, OLD)  # type: ignore[arg-type]
    for i, share in enumerate(ts):
        mine = homes.count(i) + (output == i)
        assert abs(mine - (n_layer + 1) * share / sum(ts)) <= 1


@given(
    ts=SHARES,
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=100),
    output=st.integers(1, 1000),
)
def test_by_bytes_fills_in_order(ts: list[int], sizes: list[int], output: int) -> None:
    """No GPU but the last takes more than its share of the bytes."""
    homes = layers_by_bytes(ts, sizes, output, 999)
    assert list(homes) == sorted(homes)
    total, end = sum(sizes) + output, 0.0
    for i, share in enumerate(ts[:-1]):
        end += share / sum(ts) * total
        assert sum(b for b, home in zip(sizes, homes, strict=True) if home <= i) <= end + 1e-6


def test_equal_layers_by_bytes_are_split_like_counts() -> None:
    """64 equal layers without an output to speak of halve over two equal GPUs."""
    homes = layers_by_bytes([1, 1], [100] * 64, 1, 999)
    assert counts(homes, 2) == [32, 32]
    assert layers_by_bytes([1, 1], [100] * 64, 1, 32)[:32] == (HOST,) * 32


def test_shares_that_make_no_split_are_refused() -> None:
    """No, negative or only zero shares are errors; so is a build that splits by bytes."""
    for ts in ([], [0, 0], [-1, 2]):
        with pytest.raises(UsageError, match="shares"):
            layers_of(ts, 10, 99, "ik", OLD)
    with pytest.raises(UsageError, match="by bytes"):
        layers_of([1, 1], 10, 99, "ik", "2026-08-15")
