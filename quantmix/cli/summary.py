"""What a person wants to see of a design: the mix, the memory, the quality, what to run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from quantmix.emit.readme import mix_rows, quality_text
from quantmix.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from quantmix.recipe import DeviceUse
    from quantmix.request import Answer

_BAR = 40
_PARTS = (
    ("weights_bytes", "█", "blue"),
    ("kv_bytes", "▓", "yellow"),
    ("derived_bytes", "▒", "magenta"),
    ("compute_bytes", "▒", "green"),
    ("reserve_bytes", "░", "white"),
)


def print_summary(console: Console, answer: Answer) -> None:
    """Print the summary of a design."""
    from rich.markup import escape
    from rich.table import Table

    recipe = answer.recipe
    size = recipe.size
    console.print(
        f"\n[bold]{recipe.model.id}[/bold]  {gib(size.tensor_bytes)}  "
        f"{size.bpw:.4f} bpw  {recipe.budget.get('label', '')}  ({recipe.engine.name})"
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
    console.print(f"\n[bold]Quality[/bold]  {quality_text(recipe.quality)}")
    for warning in recipe.quality.warnings:
        console.print(f"  [yellow]warning[/yellow]  {warning}")
    for row in answer.published:
        console.print(
            f"  [dim]published at {row['bpw']:.3f} bpw: {row['label']}, PPL {row['ppl']:.4f}, "
            f"{row['source']}[/dim]",
            soft_wrap=True,
        )
    if recipe.speed.tg_tps is not None:
        s = recipe.speed
        console.print(
            f"[bold]Speed[/bold]  {s.tg_tps:.1f} t/s generating [{s.tg_low:.1f}, {s.tg_high:.1f}]",
            markup=True,
        )
    elif recipe.devices and not recipe.budget.get("ideal"):
        ram = any(d.kind == "host" and d.capacity_bytes for d in recipe.devices)
        console.print(
            f"[bold]Speed[/bold]  unknown: name the cards{' and the CPU (--cpu)' if ram else ''} "
            "as `quantmix rigs` lists them for tokens per second"
        )
    _print_proof(console, answer)
    _print_real_cards(console, answer)
    for note in (*answer.notes, *recipe.offload.get("notes", [])):
        console.print(f"[bold]Note[/bold]  {escape(note)}", soft_wrap=True)
    _print_commands(console, answer)


def _print_memory(console: Console, devices: tuple[DeviceUse, ...]) -> None:
    console.print(
        "\n[bold]Memory[/bold]  [blue]█[/blue] weights  [yellow]▓[/yellow] KV cache  "
        "[magenta]▒[/magenta] built at load  [green]▒[/green] compute  ░ reserve"
    )
    width = max(d.capacity_bytes or d.used_bytes for d in devices) or 1
    for d in devices:
        bar = ""
        for key, mark, colour in _PARTS:
            n = round(_BAR * getattr(d, key) / width)
            bar += f"[{colour}]{mark * n}[/{colour}]" if n else ""
        free = "" if d.free_bytes is None else f", {gib(d.free_bytes)} free"
        of = "" if d.capacity_bytes is None else f" of {gib(d.capacity_bytes)}"
        console.print(f"  {d.name:6}{bar} {gib(d.used_bytes)}{of}{free}")


def _print_proof(console: Console, answer: Answer) -> None:
    o = answer.recipe.optimality
    spent = (
        f" {o.given_for_speed:.5f} of it given for speed (--quality-slack);"
        if o.given_for_speed
        else ""
    )
    where = "" if o.holds_for == "any mix" else f" on {o.holds_for}"
    console.print(
        f"[bold]Proof[/bold]  damage {o.objective:.5f} nats;{spent} no mix below "
        f"{o.lower_bound:.5f}{where} (gap {o.gap:.1e}, {answer.solve_seconds:.2f} s)"
    )
    for constraint in o.constraints:
        console.print(f"  [dim]{constraint}[/dim]")
    if answer.check is None:
        console.print("[bold]Check[/bold]  skipped (--no-check)")
    elif answer.check.engine is None:
        console.print(f"[bold]Check[/bold]  rules matched back; no engine: {answer.check.note}")
    else:
        c = answer.check
        console.print(
            f"[bold]Check[/bold]  {c.engine}: {c.tensors_compared} tensors, "
            f"{c.types_differing} types and {c.bytes_differing} sizes differing"
        )


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
        console.print(f"  [dim]{cards.count}× {cards.label}: {verdict}[/dim]")


def _print_commands(console: Console, answer: Answer) -> None:
    recipe, folder = answer.recipe, answer.folder
    console.print(f"\n[bold]Written[/bold]  {folder}/")
    console.print(f"  {folder}/quantize.sh SOURCE.gguf OUT.gguf IMATRIX.dat", soft_wrap=True)
    if recipe.devices:
        env = " ".join(f"{k}={v}" for k, v in recipe.offload["env"].items())
        serve = shlex.join(recipe.commands["serve"])
        console.print(f"  {env} {serve}".replace("   ", "  "), soft_wrap=True, markup=False)
