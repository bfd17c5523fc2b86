"""Refits every shipped parameter file from raw tables: `python -m quantmix.loss.fit --help`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from quantmix.errors import QuantmixError


def command(main: Callable[[], None]) -> None:
    """Run `main` as a command: an error is one line on stderr, and its code the exit code."""
    try:
        main()
    except QuantmixError as err:
        print(f"quantmix: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
