"""The error tree and its exit codes."""

from __future__ import annotations

import pytest

from quantmix import errors


@pytest.mark.parametrize(
    ("kind", "code", "builtin"),
    [
        (errors.UsageError, 2, ValueError),
        (errors.UnknownName, 2, LookupError),
        (errors.BadFile, 2, ValueError),
        (errors.SourceMismatch, 2, ValueError),
        (errors.InfeasibleBudget, 3, ValueError),
        (errors.EngineError, 4, RuntimeError),
        (errors.EngineMissing, 4, RuntimeError),
        (errors.CheckFailed, 5, AssertionError),
    ],
)
def test_exit_codes_are_the_documented_ones(
    kind: type[errors.QuantmixError], code: int, builtin: type[Exception]
) -> None:
    """Each error has the documented exit code and is also a builtin."""
    assert kind.exit_code == code
    assert issubclass(kind, builtin)
    assert issubclass(kind, errors.QuantmixError)


def test_every_error_stands_in_the_drawn_tree() -> None:
    """The tree in the module's docstring names every class."""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert name in (errors.__doc__ or "")


def test_suggestions_prefer_the_same_word_in_another_case() -> None:
    """A name equal but for case is the only suggestion."""
    assert errors.suggest("q6_k", ["q6_K", "q6_0", "q5_k"]) == ["q6_K"]
    assert errors.suggest("deepsek-r1", ["deepseek-r1", "qwen3"]) == ["deepseek-r1"]
