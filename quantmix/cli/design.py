"""`quantmix design`: the recipe for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantmix.cli import options
from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="design",
        help="Search the mix of least predicted damage that fits a budget; write the recipe.",
        epilog="Example: quantmix design deepseek-r1 --gpus 2xrtx-pro-6000 --ctx 32k --ctk q8_0",
    )(answer_errors(design))


def design(
    model: options.ModelName,
    vram: options.Vram = None,
    gpus: options.Gpus = None,
    rig: options.RigName = None,
    size: Annotated[
        str | None, typer.Option(help="A file of this size (240G) or density (3.5bpw).")
    ] = None,
    ram: options.Ram = None,
    ram_reserve: options.RamReserve = None,
    reserve: options.Reserve = None,
    desktop: options.Desktop = False,
    cpu: options.Cpu = None,
    cpu_cores: options.CpuCores = None,
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
    cram: Annotated[int, typer.Option(help="The server's prompt cache in RAM, MiB.")] = 0,
    types: options.Types = None,
    pin: options.Pins = None,
    floor: options.Floors = None,
    no_imatrix: options.NoImatrix = False,
    allow_slow_cpu: Annotated[
        bool, typer.Option("--allow-slow-cpu", help="Types that decode slowly may go to RAM.")
    ] = False,
    max_loss: Annotated[
        str | None, typer.Option(help="Smallest part of the budget with this PPL rise at most: 1%.")
    ] = None,
    min_tps: Annotated[
        float | None, typer.Option(help="At least this many tokens per second.")
    ] = None,
    quality_slack: Annotated[
        float | None, typer.Option(help="Nats of damage that speed may cost.")
    ] = None,
    measurements: options.MeasurementsFile = None,
    own: Annotated[
        bool, typer.Option("--own", help="Calibrate on what `verify` stored of this GGUF's mixes.")
    ] = False,
    layout: options.Layout = None,
    out: Annotated[Path, typer.Option(help="Folder for recipes.")] = Path("recipes"),
    name: Annotated[str | None, typer.Option(help="Name of the recipe.")] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not ask the engine to walk the recipe.")
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds for closing the gap exactly.")
    ] = None,
    dump_problem: Annotated[
        Path | None, typer.Option(help="Write groups, options and constraints as JSON.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Parse, design, print."""
    asked: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("as_json", "quiet")}
    from quantmix.request import Request, fulfil

    answer = fulfil(Request(**asked))
    if as_json:
        print_json(answer.to_json())
    if not quiet:
        from quantmix.cli.summary import print_summary

        print_summary(console(), answer)
