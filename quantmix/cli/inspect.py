"""`quantmix inspect`: tensors, shapes, roles and sizes, as stored or at any type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantmix.cli import options
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
    from quantmix.models.inspect import Group, Row
    from quantmix.models.model import Model


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="inspect",
        help="Show what a model is made of: bytes per tensor, role and layer, at any type.",
        epilog="Example: quantmix inspect deepseek-r1 --at iq4_ks --by layer --sort bytes",
    )(answer_errors(inspect))


def inspect(
    model: options.ModelName,
    at: Annotated[
        str | None,
        typer.Option(help="Sizes at this type (iq4_ks), fallbacks applied, or preset (Q4_K_M)."),
    ] = None,
    by: Annotated[str, typer.Option(help="One line per role, layer or tensor.")] = "role",
    sort: Annotated[
        str, typer.Option(help="Order: file, name, bytes, elements or active.")
    ] = "file",
    engine: Annotated[str, typer.Option(help="Whose types and fallbacks: ik or mainline.")] = "ik",
    layout: Annotated[
        str | None, typer.Option(help="MLA layout: split, ik or legacy (catalog, Hugging Face).")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Parse, load, print."""
    from quantmix.engine import presets
    from quantmix.ggml.types import ENGINES
    from quantmix.models.inspect import GROUPINGS, group, rows_of, sort_groups, total
    from quantmix.models.sources import load_model

    grouping = one_of("grouping", by, GROUPINGS)
    known_engine = one_of("engine", engine, ENGINES)
    loaded = load_model(model, layout=layout)
    if at and presets.is_preset(at, known_engine):
        loaded, at = presets.made(loaded, at, known_engine), None
    rows = rows_of(loaded, at, known_engine)
    groups = sort_groups(group(rows, grouping), sort)
    if as_json:
        print_json(
            {
                "model": _model_json(loaded),
                "total": total(rows).to_json(),
                "by": grouping,
                "groups": [g.to_json() for g in groups],
                "tensors": [r.to_json() for r in rows],
            }
        )
        return
    _print(loaded, rows, groups, total(rows), grouping, quiet)


def _model_json(model: Model) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "id": model.id,
        "display": model.display,
        "arch": model.arch,
        "layout": model.layout,
        "n_tensors": len(model.tensors),
        "n_elements": model.n_elements,
        "source": model.source,
        "header_bytes": model.header_bytes,
        "hparams": asdict(model.hparams),
        "notes": list(model.notes),
    }


def _print(
    model: Model,
    rows: tuple[Row, ...],
    groups: tuple[Group, ...],
    everything: Group,
    by: str,
    quiet: bool,
) -> None:
    from rich.table import Table

    from quantmix.units import gib

    shapes = {r.tensor.name: "x".join(map(str, r.tensor.shape)) for r in rows}
    table = Table(title=f"{model.display or model.id} ({model.arch}, {model.layout})")
    table.add_column(by)
    table.add_column("shape" if by == "tensor" else "tensors", justify="right")
    for head in ("weights", "bpw", "size", "read per token"):
        table.add_column(head, justify="right")
    table.add_column("types")
    for g in (*groups, everything):
        if g is everything:
            table.add_section()
        table.add_row(
            g.name,
            shapes.get(g.name, str(g.n_tensors)) if by == "tensor" else str(g.n_tensors),
            f"{g.n_elements:,}",
            f"{g.bpw:.3f}",
            gib(g.n_bytes),
            gib(g.active_bytes),
            ", ".join(f"{n} {t}" if by != "tensor" else t for t, n in g.types.items()),
        )
    out = console(quiet)
    print_table(out, table)
    for note in model.notes:
        out.print(f"note: {note}", style="dim")
