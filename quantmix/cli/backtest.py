"""`quantmix backtest`: how good the predictions are, on what was measured and published."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


class Kind(StrEnum):
    """What to look back at."""

    quality = "quality"
    memory = "memory"
    speed = "speed"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        "backtest",
        help="How good predictions of quality, memory or speed are, on published measurements.",
        epilog="Example: quantmix backtest memory --json > memory.json",
    )(backtest)


@answer_errors
def backtest(
    kind: Annotated[Kind, typer.Argument(help="Which predictions.")] = Kind.quality,
    measurements: Annotated[
        Path | None, typer.Option("--measurements", help="quality: CSV of measured perplexities.")
    ] = None,
    recipes: Annotated[
        Path | None, typer.Option("--recipes", help="quality: folder of recipes with PPL in names.")
    ] = None,
    logs: Annotated[
        Path | None,
        typer.Option("--logs", help="memory, speed: CSV of engine logs (default: those shipped)."),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Print bands of error and everything that could not be judged."""
    given = {"measurements": measurements, "recipes": recipes, "logs": logs}
    doc = _run(kind, {name: path for name, path in given.items() if path is not None})
    if as_json:
        print_json(doc)
    _print(doc, kind, quiet)


def _run(kind: Kind, given: dict[str, Path]) -> dict[str, Any]:
    """Call the backtest of that kind.

    Raises:
        UsageError: an option that this kind does not take, or one that it needs.
    """
    import importlib
    import inspect

    from quantmix.errors import UsageError

    package = {"quality": "loss", "memory": "memory", "speed": "speed"}[kind.value]
    run = importlib.import_module(f"quantmix.{package}.backtest").run
    takes = inspect.signature(run).parameters
    for name in given:
        if name not in takes:
            raise UsageError(f"backtest {kind.value} takes no --{name}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            raise UsageError(f"backtest {kind.value} needs --{name} FILE")
    doc: dict[str, Any] = run(**given)
    return doc


def _print(doc: dict[str, Any], kind: Kind, quiet: bool) -> None:
    """Bands, regimes and the reasons of what was not judged, for people."""
    from collections import Counter

    from rich.table import Table

    out = console(quiet)
    title = f"backtest {kind.value}: {doc['n']} figures"
    out.print(_upright(doc["bands"], "band", Table(title=title)))
    regimes = doc.get("controls", {}).get("regimes")
    if regimes:
        out.print(_upright(regimes, "regime", Table(title="compute, by what decides the buffer")))
    if kind is Kind.quality:
        _print_quality(doc, out)
    wrong = [r for r in doc["rows"] if r.get("ok") is False]
    for row in wrong:
        out.print(f"off: {row['id']}: predicted {row['predicted']}, measured {row['measured']}")
    for why, n in Counter(s["why"] for s in doc["skipped"]).most_common():
        out.print(f"not judged: {n} x {why}")


def _print_quality(doc: dict[str, Any], out: Any) -> None:
    """Controls, what stands apart, models left out, order of pairs, and where a control wins."""
    from rich.table import Table

    parts = {
        "control: bits per weight only": doc["controls"]["bpw_only"]["bands"],
        "control: type curve x parameter counts": doc["controls"]["by_size"]["bands"],
        "whole models left out": doc["leave_model_out"]["bands"],
        "recipes of a tool, from other mixes": doc["leave_tool_out"]["bands"],
        f"shown apart: {', '.join(doc['shown_apart']['models'])}": doc["shown_apart"]["bands"],
    }
    for title, bands in parts.items():
        out.print(_upright(bands, "band", Table(title=title)))
    order = doc["order"]
    if order["n"]:
        out.print(
            f"order of {order['n']} pairs of one size: right in {order['ours']:.0%} "
            f"[{order['ours_low']:.0%}, {order['ours_high']:.0%}], bpw only "
            f"{order['bpw_only']:.0%}, parameter counts {order['by_size']:.0%}",
        )
    for line in doc["loses"]:
        out.print(f"a control wins: {line}")


def _upright(rows: list[dict[str, Any]], head: str, table: Any) -> Any:
    """A rich table with one column per row of `rows` and one line per figure that any has."""
    table.add_column(head)
    for row in rows:
        table.add_column(str(row[head]), justify="right")
    for name in dict.fromkeys(key for row in rows for key in row if key != head):
        table.add_row(name, *(_cell(row.get(name)) for row in rows))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
