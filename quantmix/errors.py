"""Every error that quantmix raises on purpose.

    QuantmixError
    ├── UsageError (ValueError)            exit 2   a flag, size or regex that makes no sense
    │   ├── UnknownName (LookupError)      exit 2   a model, type, device or rig that nobody knows
    │   └── BadFile (ValueError)           exit 2   a file that is missing or malformed
    │       └── SourceMismatch             exit 2   a source that does not match the recipe
    ├── InfeasibleBudget (ValueError)      exit 3   nothing fits; says by how much and what would
    ├── EngineError (RuntimeError)         exit 4   an engine that failed
    │   └── EngineMissing                  exit 4   no engine of the needed kind was found
    └── CheckFailed (AssertionError)       exit 5   a check or verification that did not hold

A message says what is wrong, where, and how to mend it, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantmixError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(QuantmixError, ValueError):
    """A flag, size, regex or combination that makes no sense."""

    exit_code = 2


class UnknownName(UsageError, LookupError):
    """A name that is not in a table; the message suggests the nearest ones."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
        """Build the error for `name`, with the nearest known names as the mend."""
        near = suggest(name, known)
        mend = f"did you mean {' or '.join(near)}?" if near else hint
        return cls(f"unknown {kind} {name!r}" + (f": {mend}" if mend else ""))


class BadFile(UsageError):
    """A file that is missing, malformed or not what was asked for."""


class SourceMismatch(BadFile):
    """A source that does not match the recipe made for it."""


class InfeasibleBudget(QuantmixError, ValueError):
    """Nothing fits: says by how many bytes, and the smallest budget that works."""

    exit_code = 3


class EngineError(QuantmixError, RuntimeError):
    """An engine that failed; the message carries its last lines."""

    exit_code = 4


class EngineMissing(EngineError):
    """No engine of the needed kind was found; the message says where it was looked for."""


class CheckFailed(QuantmixError, AssertionError):
    """A check or verification that did not hold."""

    exit_code = 5


def suggest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` names of `known` nearest to `name`; one equal but for case comes alone."""
    names = list(known)
    same = [k for k in names if k.lower() == name.lower()]
    if same:
        return same[:1]
    return difflib.get_close_matches(name, names, n=n, cutoff=0.6)
