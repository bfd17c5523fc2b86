"""Budgets as text: every flag of `design`, no other."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.batch import flags
from quantmix.errors import UnknownName, UsageError
from quantmix.request import Request


def test_every_flag_of_design_is_known() -> None:
    """Whatever a Request holds can be written in a budget and in a job."""
    assert set(flags.names()) == {f.name for f in fields(Request)} - {"model"}
    for name in flags.names():
        with pytest.raises(UsageError, match=r"is not (a|true)"):
            flags.from_toml(name, object())


def test_kinds() -> None:
    """Texts, numbers, switches, paths and repeated flags get their types."""
    found = flags.parse(
        "--gpus 2x96G,32G --ram 256G --ubatch 4096 --min-tps=7.5 --nkvo --pin 'a.*b=q8_0' "
        "--pin output=q6_K --measurements m.json"
    )
    assert found == {
        "gpus": "2x96G,32G",
        "ram": "256G",
        "ubatch": 4096,
        "min_tps": 7.5,
        "nkvo": True,
        "pin": ("a.*b=q8_0", "output=q6_K"),
        "measurements": Path("m.json"),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("192G", "'192G' is not a flag"),
        ("--vrm 192G", "did you mean --vram"),
        ("--vram", "needs a value"),
        ("--nkvo=yes", "takes no value"),
        ("--ubatch many", "not a whole number"),
        ("--min-tps fast", "not a number"),
        ("--vram '192G", "cannot be split"),
    ],
)
def test_errors_name_the_flag(text: str, words: str) -> None:
    """What is wrong is said in one line with the flag in it."""
    with pytest.raises(UsageError) as caught:
        flags.parse(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_lookup_errors() -> None:
    """An unknown flag is an UnknownName."""
    with pytest.raises(UnknownName):
        flags.parse("--nosuch 1")


@given(st.text(min_size=1).filter(lambda t: "\0" not in t))
def test_values_come_through_quoting(value: str) -> None:
    """Any text survives being quoted for a shell."""
    assert flags.parse(f"--types {shlex.quote(value)}") == {"types": value}


@given(st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    """Nothing but a UsageError comes out of garbage."""
    with contextlib.suppress(UsageError):
        assert set(flags.parse(text)) <= set(flags.names())


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("ctx", 32768, "32768"),
        ("ctx", "32k", "32k"),
        ("ubatch", 512, 512),
        ("min_tps", 10, 10.0),
        ("nkvo", True, True),
        ("pin", "a=q8_0", ("a=q8_0",)),
        ("pin", ["a=q8_0", "b=q6_K"], ("a=q8_0", "b=q6_K")),
        ("measurements", "m.json", Path("m.json")),
    ],
)
def test_toml_values(name: str, value: object, wanted: object) -> None:
    """TOML's own types stand for what the flag takes as text."""
    assert flags.from_toml(name, value) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ctx", True),
        ("ubatch", "512"),
        ("nkvo", 1),
        ("pin", [1]),
        ("measurements", 3),
        ("mla", 1.5),
    ],
)
def test_toml_values_of_another_kind(name: str, value: object) -> None:
    """A value of another kind is refused, not converted."""
    with pytest.raises(UsageError):
        flags.from_toml(name, value)
