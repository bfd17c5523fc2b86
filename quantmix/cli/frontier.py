"""`quantmix frontier`: predicted perplexity against size, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantmix.cli import options
from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from quantmix.frontier import Frontier


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="frontier",
        help="Predicted perplexity against size: the Pareto curve, with what others published.",
        epilog="Example: quantmix frontier deepseek-r1-0528 --from 130G --to 400G --plot r1.svg",
    )(answer_errors(frontier))


def frontier(
    model: options.ModelName,
    start: Annotated[
        str | None, typer.Option("--from", help="Smallest size: 130G or 2bpw (default: 0.7 nats).")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", help="Largest size: 400G or 5bpw.")] = None,
    points: Annotated[int, typer.Option(help="How many points of the curve.")] = 40,
    engine: options.Engine = "ik",
    ctx: Annotated[str, typer.Option(help="Context for the memory of one device.")] = "32768",
    ctk: Annotated[str, typer.Option(help="Type of the K cache (V: the same).")] = "f16",
    types: options.Types = None,
    pin: options.Pins = None,
    floor: options.Floors = None,
    no_imatrix: options.NoImatrix = False,
    measurements: options.MeasurementsFile = None,
    layout: options.Layout = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot, .png or .svg.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Parse, sweep, print."""
    from quantmix.budget import make_settings
    from quantmix.flag_texts import parse_ctx, type_limits
    from quantmix.frontier import frontier as curve
    from quantmix.frontier import parse_bound, sweep
    from quantmix.models.sources import load_model

    found = load_model(model, layout=layout)
    settings = make_settings(
        engine=engine, ctx=parse_ctx(ctx) or found.hparams.ctx_train or None, ctk=ctk, ctv=ctk
    )
    limits = type_limits(types, pin, floor, imatrix=not no_imatrix)
    swept = sweep(found, settings, limits=limits, measurements=measurements)
    low, high = parse_bound(start, "--from", found), parse_bound(end, "--to", found)
    result = curve(swept, low, high, points)
    document = result.to_json()
    if plot is not None:
        _plot(found.display or found.id, document, plot)
    if as_json:
        print_json(document)
    if not quiet:
        _print(console(), result)


def _plot(name: str, document: dict[str, Any], file: Path) -> None:
    from quantmix.report import figures

    section = {"name": name, "frontier": document, "recipes": [], "measured": []}
    figures.save_curve(section, file)


def _print(out: Console, result: Frontier) -> None:
    """The table for people."""
    from rich.table import Table
    from rich.text import Text

    from quantmix.report.words import say

    model, settings = result.sweep.model, result.sweep.settings
    table = Table(box=None, pad_edge=False, header_style="dim")
    heads = ("size", "bpw", "one device", "PPL", "interval", "rise", "nats/GiB", "")
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for i, p in enumerate(result.points):
        q = p.quality
        span = f"{say(q.ppl_low, 'ppl')} – {say(q.ppl_high, 'ppl')}"
        if q.ppl is None:
            span = f"{say(q.ln_ppl_ratio_low, 'rise')} – {say(q.ln_ppl_ratio_high, 'rise')}"
        table.add_row(
            say(p.tensor_bytes, "gib"),
            say(p.bpw, "bpw"),
            say(p.vram_bytes, "gib"),
            say(q.ppl, "ppl"),
            span,
            say(q.ln_ppl_ratio, "rise"),
            say(p.price, "price"),
            "← knee" if i == result.knee else "",
        )
    name = (f"\n{model.display or model.id}", "bold")
    out.print(Text.assemble(name, f"  {settings.engine}, predicted"))
    out.print(table)
    out.print(f"one device: with cache and buffers at {settings.ctx} context", style="dim")
    if result.published:
        _print_published(out, result)


def _print_published(out: Console, result: Frontier) -> None:
    from rich.table import Table

    from quantmix.report.words import say

    table = Table(
        box=None, pad_edge=False, header_style="dim", title="published", title_justify="left"
    )
    for head in ("mix", "size", "PPL", "frontier there", "source"):
        side: Literal["left", "right"] = "left" if head in ("mix", "source") else "right"
        table.add_column(head, justify=side, overflow="fold")
    for mark in result.published:
        here = mark.predicted_here
        table.add_row(
            mark.row.label,
            say(mark.tensor_bytes, "gib"),
            say(mark.row.ppl, "ppl"),
            say(here.quality.ppl if here else None, "ppl"),
            mark.row.source,
        )
    out.print(table)
