"""`quantmix credits`: whose measurements and facts the numbers rest on."""

from __future__ import annotations

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="credits",
        help="Say whose measurements and facts the numbers rest on.",
        epilog="Example: quantmix credits",
    )(answer_errors(show_credits))


def show_credits(as_json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """Look up, print."""
    from quantmix.sources import CREDIT, sources

    rows = sources()
    if as_json:
        print_json({"credit": CREDIT, "sources": [r.to_json() for r in rows]})
    if not quiet:
        out = console()
        out.print(CREDIT)
        for row in rows:
            out.print(f"  {row.count:5d} facts on {row.what}: {row.source}")
