"""`quantmix predict`: size, damage and perplexity of a mix that someone else made."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json, print_table

if TYPE_CHECKING:
    from quantmix.predict import Prediction


class EngineName(StrEnum):
    """Whose types and fallbacks."""

    ik = "ik"
    mainline = "mainline"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        "predict",
        help="Size, damage and perplexity (90 % interval) of a mix: a recipe, rules or a GGUF.",
        epilog="Example: quantmix predict deepseek-r1-0528 --uniform iq3_k",
    )(predict)


@answer_errors
def predict(
    model: Annotated[str, typer.Argument(help="Catalog name, GGUF, folder or hf:org/name.")],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="A recipe of ours, a file of regex=type lines, or a GGUF."),
    ] = None,
    uniform: Annotated[
        str | None,
        typer.Option(
            "--uniform",
            help="One type for every tensor (iq4_ks), or a preset (Q4_K_M).",
        ),
    ] = None,
    engine: Annotated[EngineName, typer.Option("--engine", help="Engine.")] = EngineName.ik,
    layout: Annotated[
        str | None, typer.Option("--layout", help="MLA models: split, ik or legacy.")
    ] = None,
    no_imatrix: Annotated[
        bool, typer.Option("--no-imatrix", help="Quantized without an importance matrix.")
    ] = False,
    measurements: Annotated[
        Path | None, typer.Option("--measurements", help="What `quantmix measure` wrote.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Print what the mix will be."""
    from dataclasses import asdict

    from quantmix import predict as mixes
    from quantmix.errors import UsageError
    from quantmix.loss import load as load_loss
    from quantmix.models.sources import load_model

    if (recipe is None) == (uniform is None):
        raise UsageError("predict needs one of --recipe FILE and --uniform TYPE")
    base = load_model(model, layout=layout)
    if recipe is not None:
        asked = mixes.read_mix(recipe, base, engine.value)
    else:
        asked = mixes.uniform(base, uniform or "", engine.value, imatrix=not no_imatrix)
    loss = load_loss(base, engine=engine.value, imatrix=not no_imatrix, measurements=measurements)
    foreign = recipe is not None and not mixes.is_ours(recipe)
    found = mixes.predict(base, asked, engine=engine.value, loss=loss, foreign=foreign)
    if as_json:
        print_json(
            {
                "model": base.id,
                "size": asdict(found.size),
                "quality": {**asdict(found.quality), "warnings": list(found.quality.warnings)},
                "roles": found.roles,
                "unmatched": list(found.unmatched),
                "fallbacks": [
                    {"tensor": t, "asked": a, "written": w} for t, a, w in found.fallbacks
                ],
            }
        )
    _print(base.display or base.id, found, quiet)


def _print(name: str, found: Prediction, quiet: bool) -> None:
    """Summary and the table of roles, for people."""
    from rich.table import Table

    from quantmix.emit.readme import quality_text
    from quantmix.units import gib

    out = console(quiet)
    q, size = found.quality, found.size
    out.print(f"{name}: {gib(size.tensor_bytes)}, {size.bpw:.3f} bits per weight")
    out.print(quality_text(q))
    table = Table(title="by role")
    for head in ("role", "damage, nats", "share", "size"):
        table.add_column(head, justify="left" if head == "role" else "right")
    for role, row in found.roles.items():
        share = row["damage"] / q.damage if q.damage else 0.0
        table.add_row(role, f"{row['damage']:.5f}", f"{share:.1%}", gib(row["bytes"]))
    print_table(out, table)
    for warning in q.warnings:
        out.print(f"warning: {warning}")
    if found.unmatched:
        first = ", ".join(found.unmatched[:3])
        out.print(f"{len(found.unmatched)} tensors are not mentioned and stay: {first}, …")
    for tensor, asked, written in found.fallbacks[:5]:
        out.print(f"{tensor}: {asked} cannot be written there, the engine writes {written}")
