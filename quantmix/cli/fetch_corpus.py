"""`quantmix fetch-corpus`: wiki.test.raw by checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="fetch-corpus",
        help="Get wiki.test.raw (WikiText-2), the text of published perplexities, by checksum.",
        epilog="Example: quantmix fetch-corpus --out wiki.test.raw",
    )(answer_errors(fetch_corpus))


def fetch_corpus(
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("wiki.test.raw"),
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Fetch unless it is there, print where it is."""
    from quantmix.texts import wikitext

    fetched = wikitext.fetch(out)
    if as_json:
        print_json({"file": str(out), "sha256": wikitext.SHA256, "fetched": fetched})
    console(quiet).print(f"{out}: {'fetched' if fetched else 'already there'}, checksum right")
