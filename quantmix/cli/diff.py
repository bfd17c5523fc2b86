"""`quantmix diff`: two mixes of one model side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from quantmix.compare import Difference, Line


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="diff",
        help="Compare two mixes of one model: types, sizes and predicted damage.",
        epilog="Example: quantmix diff recipes/mine ./theirs-00001-of-00004.gguf --by layer",
    )(answer_errors(diff))


def diff(
    a: Annotated[str, typer.Argument(help="Recipe folder, GGUF or rules file.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    by: Annotated[str, typer.Option(help="One line per role, layer or tensor.")] = "role",
    model: Annotated[str | None, typer.Option(help="Model that rules files are for.")] = None,
    engine: Annotated[str, typer.Option(help="Whose types and fallbacks: ik or mainline.")] = "ik",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Load both, compare, print."""
    from quantmix.compare import diff as compare
    from quantmix.compare import load_side
    from quantmix.ggml.types import ENGINES
    from quantmix.models.inspect import GROUPINGS

    grouping = one_of("grouping", by, GROUPINGS)
    known = one_of("engine", engine, ENGINES)
    found = compare(
        load_side(a, model=model, engine=known), load_side(b, model=model, engine=known)
    )
    if as_json:
        print_json(found.to_json())
        return
    _print(found, grouping, quiet)


def _print(found: Difference, by: str, quiet: bool) -> None:
    from rich.table import Table

    from quantmix.units import gib

    table = Table(title=f"A: {found.a.label}   B: {found.b.label}")
    table.add_column(by)
    for head in ("A size", "B size", "A nats", "B nats"):
        table.add_column(head, justify="right")
    table.add_column("A types")
    table.add_column("B types")
    if by == "tensor":
        for c in found.changes:
            table.add_row(
                c.a.name,
                gib(c.a.bytes),
                gib(c.b.bytes),
                f"{c.a.damage:.5f}",
                f"{c.b.damage:.5f}",
                c.a.type,
                c.b.type,
            )
    else:
        for line in found.roles if by == "role" else found.layers:
            table.add_row(line.name, *_cells(line))
    table.add_section()
    table.add_row(
        "total",
        gib(found.a.n_bytes),
        gib(found.b.n_bytes),
        f"{found.a.damage:.5f}",
        f"{found.b.damage:.5f}",
    )
    out = console(quiet)
    print_table(out, table)
    out.print(
        f"{len(found.changes)} tensors differ in type"
        + (f", {len(found.only_a)} only in A" if found.only_a else "")
        + (f", {len(found.only_b)} only in B" if found.only_b else "")
    )


def _cells(line: Line) -> tuple[str, ...]:
    from quantmix.units import gib

    return (
        gib(line.a_bytes),
        gib(line.b_bytes),
        f"{line.a_damage:.5f}",
        f"{line.b_damage:.5f}",
        ", ".join(f"{n} {t}" for t, n in line.a_types.items()),
        ", ".join(f"{n} {t}" for t, n in line.b_types.items())
        if line.n_changed or line.a_types != line.b_types
        else "same",
    )
