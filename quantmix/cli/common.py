"""What every command shares: one-line errors, JSON on stdout, tables on stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from quantmix.errors import QuantmixError, UnknownName, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_LEAST_WIDTH = 100

F = TypeVar("F", bound=Callable[..., Any])
Choice = TypeVar("Choice", bound=str)

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")
]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")]


def answer_errors(command: F) -> F:
    """Turn a QuantmixError into one line on stderr and its exit code; Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except QuantmixError as err:
            print(f"quantmix: {err}", file=sys.stderr)
            raise typer.Exit(err.exit_code) from None
        except KeyboardInterrupt:
            print("quantmix: interrupted; finished work is kept", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os._exit(0)

    return wrapper  # type: ignore[return-value]


def one_of(kind: str, value: str, choices: Sequence[Choice]) -> Choice:
    """Return the choice that `value` spells.

    Raises:
        UnknownName: it is none of them.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise UnknownName.of(kind, value, choices, "one of " + ", ".join(choices))


def print_json(doc: Any) -> None:
    """Print one JSON document on stdout; NaN is a bug, so it raises."""
    text = json.dumps(doc, indent=2, ensure_ascii=False, allow_nan=False)
    if _shown(text) != text:
        text = json.dumps(doc, indent=2, allow_nan=False)
    print_out(text)


def print_out(text: str) -> None:
    """Print a result on stdout, at once.

    Raises:
        UsageError: stdout cannot take it, as a file on a full disk.
    """
    try:
        print(_shown(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError as err:
        with suppress(OSError, ValueError):  # what is left unwritten would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UsageError(f"standard output cannot be written: {err.strerror or err}") from err


def _shown(text: str) -> str:
    """Return `text` with what stdout has no characters for escaped (names that are no UTF-8)."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@functools.cache
def console(quiet: bool = False) -> Console:
    """Return the console for people: stderr, colour only on a terminal, NO_COLOR honoured.

    Texts are printed as they are: brackets in a regex or a path are no markup.
    """
    from rich.console import Console

    width = None if sys.stderr.isatty() else 110
    return Console(stderr=True, quiet=quiet, markup=False, highlight=False, width=width)


def print_table(out: Console, table: Table) -> None:
    """Print a table of which nothing is cut: names to copy stay whole, other cells are folded."""
    for column in table.columns:
        column.overflow = "fold"
    table.columns[0].no_wrap = True
    wide(out).print(table)


def wide(out: Console) -> Console:
    """Return the console for tables: a narrow terminal wraps their lines and loses nothing."""
    from rich.console import Console

    if out.width >= _LEAST_WIDTH:
        return out
    return Console(
        file=out.file, quiet=out.quiet, markup=False, highlight=False, width=_LEAST_WIDTH
    )
