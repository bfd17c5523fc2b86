"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.errors import UsageError
from quantmix.units import GIB, gib, pad, parse_bpw, parse_memory, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("192G", 192 * 2**30),
        ("192GiB", 192 * 2**30),
        ("192GB", 192 * 10**9),
        ("800M", 800 * 2**20),
        ("1.5g", 3 * 2**29),
        ("123", 123),
        (" 24 G ", 24 * 2**30),
    ],
)
def test_sizes_are_read(text: str, n_bytes: int) -> None:
    """G and GiB are 2^30, GB is 10^9."""
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["192X", "-5G", "", "G", "1e3G", "0", "0G", "nan", "1..2G"])
def test_nonsense_is_refused_by_name(text: str) -> None:
    """What is not a size above zero is answered with the flag's name."""
    with pytest.raises(UsageError, match="--vram"):
        parse_size(text, "--vram")


@pytest.mark.parametrize(
    "text", ["9" * 400 + ".5", "9" * 5000, "9" * 400 + "G", "9" * 5000 + ".1T"]
)
def test_sizes_beyond_any_machine_are_refused(text: str) -> None:
    """Digits without end are one short line, whatever the number's form."""
    with pytest.raises(UsageError, match=r"--vram .* is larger than any memory") as caught:
        parse_size(text, "--vram")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["12", " 24 ", "192"])
def test_memory_without_a_unit_is_asked_for_it(text: str) -> None:
    """12 bytes are nobody's memory; plain bytes of a real size, and small units, are taken."""
    with pytest.raises(UsageError, match=f"--vram {text.strip()} means .* write {text.strip()}G"):
        parse_memory(text, "--vram")
    assert parse_memory(str(2**34), "--vram") == 2**34
    assert parse_memory("12b", "--vram") == 12


@pytest.mark.parametrize("text", ["nanbpw", "bpw", "x bpw", "-3BPW"])
def test_a_density_that_is_none_is_told_its_form(text: str) -> None:
    """What ends in bpw is no size in bytes either."""
    with pytest.raises(UsageError, match=r"--size .* write it like 3.5bpw"):
        parse_bpw(text, "--size")
    assert parse_bpw("3.5bpw") == 3.5
    assert parse_bpw("192G") is None


def test_fractions_are_exact() -> None:
    """A size with a dot loses no byte to binary fractions."""
    assert parse_size("9007199254740993.0") == 9007199254740993
    assert parse_size("1.7G") == 17 * 2**30 // 10
    assert parse_size("0.3GB") == 300_000_000


@given(st.integers(1, 10**15))
def test_plain_numbers_are_themselves(n: int) -> None:
    """A number without a unit is bytes."""
    assert parse_size(str(n)) == n


def test_gib_names_its_unit() -> None:
    """Below one GiB the text is in MiB."""
    assert gib(3 * GIB) == "3.00 GiB"
    assert gib(5 * 2**20) == "5 MiB"


@given(st.integers(0, 10**9), st.integers(1, 4096))
def test_pad_is_the_least_multiple_above(n: int, multiple: int) -> None:
    """`pad` rounds up to a multiple, by less than one multiple."""
    padded = pad(n, multiple)
    assert padded % multiple == 0
    assert 0 <= padded - n < multiple
