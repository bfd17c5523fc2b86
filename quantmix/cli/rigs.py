"""`quantmix rigs`: the rigs and devices that quantmix knows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json, print_table


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        "rigs",
        help="Rigs for --rig, devices for --gpus, and what a total of VRAM means on real cards.",
        epilog="Example: quantmix rigs --total 192G",
    )(rigs)


@answer_errors
def rigs(
    total: Annotated[
        str | None, typer.Option("--total", help="A total of VRAM: which cards make it up.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """List rigs of the field and the device table."""
    from dataclasses import asdict

    from quantmix.rig.cards import cards
    from quantmix.rig.rigs import describe_rigs, real_cards_for
    from quantmix.units import parse_size

    options = real_cards_for(parse_size(total, "--total")) if total else ()
    doc: dict[str, Any] = {
        "rigs": describe_rigs(),
        "devices": [{**asdict(c), "usable_bytes": c.usable_bytes} for c in cards().values()],
    }
    if total:
        doc["total"] = {"bytes": parse_size(total), "cards": [asdict(o) for o in options]}
    if as_json:
        print_json(doc)
    _print(doc, quiet)


def _print(doc: dict[str, Any], quiet: bool) -> None:
    from rich.table import Table

    from quantmix.units import gib

    out = console(quiet)
    if "total" in doc:
        table = Table("--gpus", "cards", "usable", "short by", title="that total on real cards")
        for o in doc["total"]["cards"]:
            short = gib(o["shortfall_bytes"]) if o["shortfall_bytes"] else "fits"
            table.add_row(o["gpus"], f"{o['count']}x {o['label']}", gib(o["usable_bytes"]), short)
        print_table(out, table)
        return
    table = Table("--rig", "GPUs", "usable VRAM", "RAM", "source", title="rigs of the field")
    for r in doc["rigs"]:
        table.add_row(r["name"], r["gpus"], gib(r["vram_bytes"]), r["ram"] or "-", r["source"])
    print_table(out, table)
    devices = Table("--gpus", "name", "usable", "GB/s", "arch", title="devices")
    for d in doc["devices"]:
        usable = gib(d["usable_bytes"]) if d["usable_bytes"] else "-"
        bandwidth = "-" if d["bandwidth_gbs"] is None else f"{d['bandwidth_gbs']:g}"
        devices.add_row(d["key"], d["name"], usable, bandwidth, d["arch"])
    print_table(out, devices)
