"""`quantmix types`: the ggml types of an engine."""

from __future__ import annotations

from typing import Annotated

import typer

from quantmix.cli.common import (
    JsonFlag,
    QuietFlag,
    answer_errors,
    console,
    one_of,
    print_json,
    print_table,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="types",
        help="List the quant types of an engine: exact names, sizes, fallbacks, what they need.",
        epilog="Example: quantmix types --engine mainline",
    )(answer_errors(types))


def types(
    engine: Annotated[str, typer.Option(help="Whose types: ik or mainline.")] = "ik",
    everything: Annotated[
        bool, typer.Option("--all", help="Internal types that no file uses, too.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Print the type table."""
    from dataclasses import asdict

    from rich.table import Table

    from quantmix.ggml.types import ENGINES, default_palette, table

    known = one_of("engine", engine, ENGINES)
    palette = {t.name for t in default_palette(known)}
    shown = [t for t in table(known).values() if everything or t.family != "internal"]
    if as_json:
        docs = [asdict(t) | {"bpw": t.bpw, "default": t.name in palette} for t in shown]
        print_json({"engine": known, "types": docs})
        return
    out = Table(title=f"{len(shown)} types of {known} (* = in the default palette)")
    for head in (
        "type",
        "id",
        "bpw",
        "row",
        "block",
        "fallback",
        "imatrix",
        "GPU",
        "CPU",
        "family",
    ):
        out.add_column(head, justify="right" if head in ("id", "bpw", "row", "block") else "left")
    for t in sorted(shown, key=lambda t: (t.bpw, t.id)):
        out.add_row(
            t.name + (" *" if t.name in palette else ""),
            str(t.id),
            f"{t.bpw:.4g}",
            f"+{t.row_meta}" if t.row_meta else "",
            str(t.block_size),
            t.fallback,
            t.imatrix,
            ("fast" if t.mmq else "yes") if t.cuda else "no",
            "slow" if t.slow_cpu else "",
            t.family,
        )
    print_table(console(quiet), out)
