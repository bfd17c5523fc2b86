"""`quantmix models`: the catalog."""

from __future__ import annotations

from typing import Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="models",
        help="List the models known by name. Any GGUF or Hugging Face checkpoint works too.",
        epilog="Example: quantmix models qwen3 --json",
    )(answer_errors(models))


def models(
    words: Annotated[
        list[str] | None, typer.Argument(help="Show only names that contain all of these.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Print the catalog."""
    from rich.table import Table

    from quantmix.models.catalog import search

    found = search(words or [])
    if as_json:
        print_json({"models": [entry.to_json() for entry in found]})
        return
    if not found:
        asked = " ".join(words or [])
        text = (
            f"no known model is named {asked!r}: `quantmix models` lists all, and a GGUF, a folder"
        )
        console(quiet).print(f"{text} of a checkpoint or hf:org/name works too")
        return
    table = Table(title=f"{len(found)} models")
    for head in ("id", "architecture", "weights", "tensors", "context", "verified", "aliases"):
        numbers = head in ("weights", "tensors", "context")
        table.add_column(head, justify="right" if numbers else "left")
    for e in found:
        table.add_row(
            e.id,
            e.arch,
            f"{e.total_params / 1e9:,.2f} B",
            str(e.n_tensors),
            f"{e.hparams.ctx_train:,}",
            e.verified,
            ", ".join(e.aliases),
        )
    print_table(console(quiet), table)
