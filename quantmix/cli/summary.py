"""What a person wants to see of a design: the mix, the memory, the quality, what to run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from quantmix.emit.readme import mix_rows, quality_text
from quantmix.emit.scripts import shell_line
from quantmix.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from quantmix.recipe import DeviceUse
    from quantmix.request import Answer

_BAR = 40
_PARTS = (
    ("weights_bytes", "█", "blue", " weights"),
    ("kv_bytes", "▓", "yellow", " KV cache"),
    ("derived_bytes", "▒", "magenta", " built at load"),
    ("compute_bytes", "▒", "green", " compute"),
    ("reserve_bytes", "░", "white", " reserve"),
)


def print_summary(console: Console, answer: Answer) -> None:
    """Print the summary of a design."""
    from rich.table import Table

    recipe = answer.recipe
    size = recipe.size
    _print_part(
        console,
        f"\n{recipe.model.id}",
        f"{gib(size.tensor_bytes)}  {size.bpw:.4f} bpw  {recipe.budget.get('label', '')}  "
        f"({recipe.engine.name})",
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tensors")
    table.add_column("type (× tensors)")
    table.add_column("size", justify="right")
    for role, types, n_bytes in mix_rows(recipe):
        table.add_row(role, types, gib(n_bytes))
    console.print(table)
    if recipe.devices:
        _print_memory(console, recipe.devices)
    _print_part(console, "\nQuality", quality_text(recipe.quality))
    for warning in recipe.quality.warnings:
        _print_part(console, "  warning", warning, style="yellow")
    for row in answer.published:
        console.print(
            f"  published at {row['bpw']:.3f} bpw: {row['label']}, PPL {row['ppl']:.4f}, "
            f"{row['source']}",
            style="dim",
            soft_wrap=True,
        )
    if recipe.speed.tg_tps is not None:
        _print_part(console, "Speed", str(recipe.speed))
    elif recipe.devices and not recipe.budget.get("ideal"):
        ram = any(d.kind == "host" and d.capacity_bytes for d in recipe.devices)
        text = f"unknown: name the cards{' and the CPU (--cpu)' if ram else ''} "
        _print_part(console, "Speed", text + "as `quantmix rigs` lists them for tokens per second")
    _print_proof(console, answer)
    _print_real_cards(console, answer)
    for note in (*answer.notes, *recipe.offload.get("notes", [])):
        _print_part(console, "Note", note, soft_wrap=True)
    _print_commands(console, answer)


def _print_part(
    console: Console, title: str, text: str, style: str = "bold", soft_wrap: bool = False
) -> None:
    from rich.text import Text

    console.print(Text.assemble((title, style), f"  {text}"), soft_wrap=soft_wrap)


def _print_memory(console: Console, devices: tuple[DeviceUse, ...]) -> None:
    from rich.text import Text

    legend = [part for _, mark, colour, name in _PARTS for part in ((f"  {mark}", colour), name)]
    console.print(Text.assemble(("\nMemory", "bold"), *legend))
    width = max(d.capacity_bytes or d.used_bytes for d in devices) or 1
    for d in devices:
        bar = [
            (mark * round(_BAR * getattr(d, key) / width), colour)
            for key, mark, colour, _ in _PARTS
        ]
        free = "" if d.free_bytes is None else f", {gib(d.free_bytes)} free"
        of = "" if d.capacity_bytes is None else f" of {gib(d.capacity_bytes)}"
        console.print(Text.assemble(f"  {d.name:6}", *bar, f" {gib(d.used_bytes)}{of}{free}"))


def _print_proof(console: Console, answer: Answer) -> None:
    o = answer.recipe.optimality
    spent = (
        f" {o.given_for_speed:.5f} of it given for speed (--quality-slack);"
        if o.given_for_speed
        else ""
    )
    where = "" if o.holds_for == "any mix" else f" on {o.holds_for}"
    _print_part(
        console,
        "Proof",
        f"damage {o.objective:.5f} nats;{spent} no mix below "
        f"{o.lower_bound:.5f}{where} (gap {o.gap:.1e}, {answer.solve_seconds:.2f} s)",
    )
    for constraint in o.constraints:
        console.print(f"  {constraint}", style="dim")
    c = answer.check
    if c is None:
        checked = "skipped (--no-check)"
    elif c.engine is None:
        checked = f"rules matched back; no engine: {c.note}"
    else:
        checked = (
            f"{c.engine}: {c.tensors_compared} tensors, "
            f"{c.types_differing} types and {c.bytes_differing} sizes differing"
        )
    _print_part(console, "Check", checked)


def _print_real_cards(console: Console, answer: Answer) -> None:
    """Say what the total of an ideal device means on cards that exist."""
    recipe = answer.recipe
    if not recipe.budget.get("ideal"):
        return
    from quantmix.rig.rigs import real_cards_for

    total = recipe.devices[0].capacity_bytes or 0
    for cards in real_cards_for(total):
        if cards.shortfall_bytes:
            verdict = f"short by {gib(cards.shortfall_bytes)}: design with --gpus {cards.gpus}"
        else:
            verdict = f"has it; design with --gpus {cards.gpus} for its exact bytes"
        console.print(f"  {cards.count}× {cards.label}: {verdict}", style="dim")


def _print_commands(console: Console, answer: Answer) -> None:
    recipe, folder = answer.recipe, answer.folder
    _print_part(console, "\nWritten", f"{folder}/")
    script = shlex.quote(str(folder / "quantize.sh"))
    console.print(f"  {script} {recipe.quantize_arguments}", soft_wrap=True)
    if recipe.devices:
        serve = shell_line(recipe.offload["env"], recipe.commands["serve"])
        console.print(f"  {serve}", soft_wrap=True)
