"""Patterns that match exactly what they were made for."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.emit.regex import int_alternation, int_group, literal, word_group


@given(st.sets(st.integers(0, 999), min_size=1, max_size=120))
def test_an_alternation_matches_its_numbers_and_no_other(numbers: set[int]) -> None:
    """Between delimiters, the pattern accepts exactly the given set among 0 to 999."""
    pattern = re.compile(rf"^blk\.{int_group(numbers)}\.x$")
    assert {n for n in range(1000) if pattern.search(f"blk.{n}.x")} == numbers


@given(st.integers(0, 120), st.integers(0, 120))
def test_a_range_stays_short(start: int, length: int) -> None:
    """A run of layers, the usual case, never takes more than seven branches."""
    text = int_alternation(range(start, start + length + 1))
    assert text.count("|") < 7
    assert not set(text) & set(",={}")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([20, *range(3, 20)], "[3-9]|1[0-9]|20"),
        ([7], "7"),
        (range(10), "[0-9]"),
        ([*range(30, 50), 60], "[34][0-9]|60"),
        ([10, 12, 20, 22], "[12][02]"),
        (range(95, 105), "9[5-9]|10[0-4]"),
    ],
)
def test_it_reads_as_a_person_would_write_it(numbers: list[int], text: str) -> None:
    """Digits are compressed into classes and nothing is repeated."""
    assert int_alternation(numbers) == text


@pytest.mark.parametrize("numbers", [[], [3, -1]])
def test_a_set_that_no_pattern_can_hold_is_refused(numbers: list[int]) -> None:
    """Empty and negative sets raise instead of matching something else."""
    with pytest.raises(ValueError, match="cannot write"):
        int_alternation(numbers)


@given(st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=20))
def test_a_literal_matches_only_itself(text: str) -> None:
    """Every special character is escaped; text with a comma or an equals sign is refused."""
    if set(text) & set(",="):
        with pytest.raises(ValueError, match="no rule"):
            literal(text)
    else:
        assert re.fullmatch(literal(text), text)


def test_words_are_grouped_only_when_there_are_several() -> None:
    """One word stands alone; several get parentheses in the order given."""
    assert word_group(["up"]) == "up"
    assert word_group(["up", "down"]) == "(up|down)"
    with pytest.raises(ValueError, match="no words"):
        word_group([])
