"""The engines' layer splits, and -ts values that give a wanted one."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.emit.layers import (
    SplitSizes,
    by_bytes,
    byte_slack,
    split_sizes,
    weights_by_bytes,
)
from quantmix.errors import UsageError
from quantmix.memory.settings import Settings
from quantmix.memory.split import by_count

from .conftest import model_of, sizes_of

COUNTS = st.lists(st.integers(1, 20), min_size=1, max_size=16)


def runs(counts: list[int]) -> list[int]:
    """GPU of every slot when each GPU takes its count in order."""
    return [g for g, n in enumerate(counts) for _ in range(n)]


@given(COUNTS, st.integers(0, 30))
def test_counts_as_weights_are_exact(counts: list[int], first: int) -> None:
    """Under the count rule, layer counts given as -ts come back as the split."""
    assert by_count(counts, first, first + sum(counts)) == runs(counts)


@given(COUNTS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_byte_weights_give_the_wanted_split(counts: list[int], first: int, random: Random) -> None:
    """Under the byte rule, the weights found put every block where it was wanted."""
    n = first + sum(counts)
    sizes = SplitSizes(tuple(random.uniform(1e9, 8e9) for _ in range(n)), 2e9)
    weights = weights_by_bytes(counts, first, sizes)
    assert by_bytes(weights, first, n, sizes) == runs(counts)
    assert all(isinstance(w, int) and w > 0 for w in weights)
    assert byte_slack(weights, counts, first, sizes) > 0


@given(COUNTS, st.randoms(use_true_random=False))
def test_byte_weights_survive_wrong_sizes_within_their_slack(
    counts: list[int], random: Random
) -> None:
    """A total error below the stated slack moves no boundary."""
    n = sum(counts)
    sizes = SplitSizes((4e9,) * n, 1e9)
    weights = weights_by_bytes(counts, 0, sizes)
    slack = byte_slack(weights, counts, 0, sizes) * 4e9
    block = random.randrange(n)
    wrong = list(sizes.blocks)
    wrong[block] += random.uniform(-0.9, 0.9) * slack
    assert by_bytes(weights, 0, n, SplitSizes(tuple(wrong), 1e9)) == runs(counts)


def test_the_rule_of_old_builds_is_the_upper_bound_rule() -> None:
    """`-ts 25,75` over 95 slots puts 24 blocks on the first GPU: block 23 is below a quarter."""
    assert by_count([25, 75], 0, 95).count(0) == 24


def test_a_gpu_with_weight_zero_gets_nothing() -> None:
    """Zero weights are skipped by both rules."""
    sizes = SplitSizes((1e9,) * 10, 1e8)
    assert set(by_count([0, 5, 5], 0, 10)) == {1, 2}
    assert 0 not in by_bytes([0, 5, 5], 0, 10, sizes)


def test_a_gpu_left_out_in_the_middle_stays_empty() -> None:
    """The byte rule can skip a GPU when its share is no more than its compute buffer."""
    sizes = SplitSizes((1e9,) * 10, 1e9)
    weights = weights_by_bytes([5, 0, 5], 0, sizes)
    assert by_bytes(weights, 0, 10, sizes) == [0] * 5 + [2] * 5


def test_blocks_without_bytes_cannot_be_split() -> None:
    """Between two empty blocks there is no share to cut at: refused, not guessed."""
    with pytest.raises(UsageError, match="no -ts"):
        weights_by_bytes([2, 2], 0, SplitSizes((1e9, 0.0, 0.0, 1e9), 1e9))


def test_ik_charges_a_split_mla_file_with_its_own_kv_b() -> None:
    """DeepSeek-R1 in mainline layout: 85 MiB per layer, as ik's own estimate has it."""
    model, sizes = model_of("deepseek-r1"), sizes_of("deepseek-r1")
    settings = Settings()
    weights = sum(b for name, b in sizes.items() if name.startswith("blk.5."))
    cache = 32768 * 576 * 2
    got = split_sizes(model, settings, sizes).blocks[5]
    assert got == weights + cache + 85 * (1 << 20)


def test_the_output_counts_with_logits_beyond_the_compute_buffer() -> None:
    """A big vocabulary on a small model makes the output slot heavier than its matrix."""
    model, sizes = model_of("llama-3.1-8b-instruct"), sizes_of("llama-3.1-8b-instruct")
    big = split_sizes(model, Settings(ubatch=4096), sizes)
    assert big.blocks[-1] > sizes["output.weight"]
    assert len(big.blocks) == 33


@given(COUNTS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_a_last_gpu_may_hold_the_output_alone(
    counts: list[int], first: int, random: Random
) -> None:
    """With layers in RAM the output is not dealt: all blocks go to the GPUs before its own."""
    n = first + sum(counts)
    sizes = SplitSizes(tuple(random.uniform(1e8, 8e8) for _ in range(n + 1)), 1e8)
    weights = weights_by_bytes([*counts, 0], first, sizes)
    assert by_bytes(weights, first, n, sizes) == runs(counts)
    assert byte_slack(weights, [*counts, 0], first, sizes) > 0
