"""`quantmix imatrix`: an importance matrix, head included."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="imatrix",
        help="Compute an importance matrix, with entries for the head (or tied embeddings) and "
        "per-expert counts; or convert one with --convert.",
        epilog="Example: quantmix imatrix model-f16.gguf --corpus text.txt --out model.dat",
    )(answer_errors(imatrix))


def imatrix(
    source: Annotated[
        Path, typer.Argument(help="Unquantized GGUF; with --convert, an imatrix file.")
    ],
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Text [default: the shipped imatrix text].")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help=".dat (ik and mainline) or .gguf [default: SOURCE.dat]."),
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=32, help="Tokens per chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="At most so many chunks [default: all].")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: all]")] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Only convert between the two formats.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Collect or convert, print what was written."""
    from quantmix.cli.progress import bar
    from quantmix.engine.imatrix import collect
    from quantmix.ggml import imatrix as files
    from quantmix.texts import text

    screen = console(quiet)
    target = out or source.with_suffix(".dat")
    if convert:
        matrix = files.read(source)
        left_out = files.write(matrix, target)
        if as_json:
            print_json(
                {
                    "file": str(target),
                    "entries": len(matrix.entries) - len(left_out),
                    "left_out": left_out,
                }
            )
        screen.print(f"{target}: {len(matrix.entries) - len(left_out)} entries")
        return
    with bar(screen, "collecting", "chunk") as tick:
        made = collect(
            source,
            corpus or text("imatrix"),
            target,
            n_ctx=ctx,
            chunks=chunks,
            threads=threads,
            on_event=tick,
        )
    if as_json:
        print_json(
            {
                "file": str(made.path),
                "entries": made.n_entries,
                "chunks": made.chunks,
                "left_out": list(made.left_out),
                "without": list(made.without),
                "seconds": made.seconds,
            }
        )
    screen.print(f"{made.path}: {made.n_entries} entries from {made.chunks} chunks")
    for name in made.left_out:
        screen.print(f"warning: {name} left out, too few of its experts ran: give more text")
    for name in made.without[:10]:
        screen.print(f"warning: no entry for {name}: the engine never multiplied it")
