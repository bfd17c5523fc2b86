"""`quantmix choose`: which of several files to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantmix.cli import options
from quantmix.cli.common import (
    JsonFlag,
    QuietFlag,
    answer_errors,
    console,
    one_of,
    print_json,
    print_out,
    print_table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from quantmix.choose import Choice, Judged

_NOT_OF_THE_REQUEST = ("files", "presets", "no_design", "as_json", "quiet")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="choose",
        help="Which of several GGUF files to take: what fits this machine, how good, how fast. "
        "Reads headers only, also over the network, before anything is downloaded.",
        epilog=(
            "Example: quantmix choose hf:ubergarm/DeepSeek-R1-0528-GGUF --gpus 2xrtx-5090 "
            "--ram 256G; with a name of the catalog, its published mixes: "
            "quantmix choose deepseek-r1-0528 --gpus 2x96G"
        ),
    )(answer_errors(choose))


def choose(
    files: Annotated[
        list[str],
        typer.Argument(
            help="GGUF files, folders of them, hf:org/name, URLs; or a catalog name for the mixes "
            "that were published.",
        ),
    ],
    gpus: options.Gpus = None,
    rig: options.RigName = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    ram_reserve: options.RamReserve = None,
    reserve: options.Reserve = None,
    desktop: options.Desktop = False,
    cpu: options.Cpu = None,
    cpu_cores: options.CpuCores = None,
    min_tps: Annotated[
        float | None, typer.Option(help="Tokens per second that the file must reach.")
    ] = None,
    engine: options.Engine = "ik",
    engine_build: options.EngineBuild = None,
    ctx: options.Ctx = "32768",
    ctk: options.Ctk = "f16",
    ctv: options.Ctv = None,
    ubatch: options.Ubatch = None,
    batch: options.Batch = None,
    profile: options.Profile = None,
    parallel: options.Parallel = 1,
    mla: options.Mla = 3,
    amb: options.Amb = 256,
    nkvo: options.Nkvo = False,
    mtp: options.Mtp = False,
    presets: Annotated[
        bool,
        typer.Option("--presets", help="Of a catalog model also the stock presets, Q8_0 to IQ1_S."),
    ] = False,
    no_design: Annotated[
        bool, typer.Option("--no-design", help="Do not say what a design would be.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Read headers, judge, print."""
    asked: dict[str, Any] = {k: v for k, v in locals().items() if k not in _NOT_OF_THE_REQUEST}
    from quantmix.budget_flags import require_machine
    from quantmix.choose import choose as judge
    from quantmix.choose import require_one
    from quantmix.cli.progress import bar
    from quantmix.flag_texts import parse_ctx
    from quantmix.ggml.types import ENGINES
    from quantmix.offers import STOCK, offers
    from quantmix.request import Request, budget_of

    request = Request(model=files[0], **asked)
    require_machine(request)
    budget_of(request, is_mla=False)  # wrong flags are told before headers are fetched
    screen = console(quiet)
    with bar(screen, "reading headers", "file") as tick:
        known = one_of("engine", engine, ENGINES)
        found = offers(files, tick, stock=STOCK if presets else (), engine=known)
    budget, _ = budget_of(request, is_mla=found.model.hparams.is_mla)
    with bar(screen, "placing", "file") as tick:
        choice = judge(
            found,
            budget,
            longest=parse_ctx(ctx) is None,
            min_tps=min_tps,
            design=not no_design,
            on_event=tick,
        )
    if as_json:
        print_json(choice.to_json())
    _show(choice, budget.label, screen)
    pick = require_one(choice)
    if not as_json:
        print_out("\n".join(_lines(pick)))


def _show(choice: Choice, machine: str, screen: Console) -> None:
    """Print the table, what was left out, and the pick."""
    from rich.table import Table
    from rich.text import Text

    model = choice.offers.model
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("file", "size", "bpw", "PPL", "", "t/s", f"on {machine}"):
        table.add_column(head, justify="right" if head in ("size", "bpw", "PPL", "t/s") else "left")
    for judged in choice.files:
        style = "dim" if judged.why else "bold" if judged is choice.pick else ""
        table.add_row(*_cells(judged), style=style)
    if choice.design is not None:
        made = choice.design
        table.add_section()
        table.add_row(
            "quantmix design", *_figures(made.size, made.quality, made.speed), "to be made"
        )
    screen.print(Text.assemble((model.display or model.id, "bold")))
    print_table(screen, table)
    reasons: dict[str, list[str]] = {}
    for name, why in choice.offers.left_out:
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        screen.print(f"left out, {why}: {', '.join(names)}", style="dim", markup=False)
    if choice.pick is not None:
        screen.print(f"\ntake {choice.pick.offer.name}: {choice.pick.offer.source}", markup=False)


def _cells(judged: Judged) -> tuple[str, ...]:
    """Return the row of a file."""
    from quantmix.report.words import say
    from quantmix.speed.prediction import Speed

    speed = judged.plan.speed if judged.plan else Speed()
    size, bpw, ppl, rest, tps = _figures(judged.size, judged.quality, speed)
    if judged.ppl is not None:
        ppl, rest = say(judged.ppl, "ppl"), "measured"
    where = judged.why or f"fits at {judged.settings.ctx} context"
    return judged.offer.name, size, bpw, ppl, rest, tps, where


def _figures(size: Any, quality: Any, speed: Any) -> tuple[str, str, str, str, str]:
    """Return size, bits per weight, perplexity (or its rise), interval, tokens per second."""
    from quantmix.report.words import say

    if size is None or quality is None:
        return "", "", "", "", ""
    if quality.ppl is None:
        ppl = say(quality.ln_ppl_ratio, "rise")
        low, high = say(quality.ln_ppl_ratio_low, "rise"), say(quality.ln_ppl_ratio_high, "rise")
    else:
        ppl = say(quality.ppl, "ppl")
        low, high = say(quality.ppl_low, "ppl"), say(quality.ppl_high, "ppl")
    tps = "" if speed.tg_tps is None else f"{speed.tg_tps:.1f}"
    return say(size.tensor_bytes, "gib"), say(size.bpw, "bpw"), ppl, f"{low} – {high}", tps


def _lines(judged: Judged) -> list[str]:
    """Return the command lines that fetch a file, if it is on the hub, and launch it."""
    from quantmix.emit.scripts import shell_line

    assert judged.plan is not None
    flags = judged.plan.flags
    serve = ["llama-server", "-m", judged.offer.file, *flags.flags]
    lines = [shell_line({}, judged.offer.fetch)] if judged.offer.fetch else []
    return [*lines, shell_line(flags.env, serve)]
