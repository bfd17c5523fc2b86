"""`quantmix design`: the recipe for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json

if TYPE_CHECKING:
    from quantmix.request import Request


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="design",
        help="Search the mix of least predicted damage that fits a budget; write the recipe.",
        epilog="Example: quantmix design deepseek-r1 --gpus 2xrtx-pro-6000 --ctx 32k --ctk q8_0",
    )(answer_errors(design))


def design(
    model: Annotated[
        str, typer.Argument(help="Catalog name, GGUF file or folder, hf:org/name or URL.")
    ],
    vram: Annotated[
        str | None, typer.Option(help="One idealised device of exactly this size.")
    ] = None,
    gpus: Annotated[str | None, typer.Option(help="Cards in CUDA order: 2xrtx-5090,2x24G.")] = None,
    rig: Annotated[str | None, typer.Option(help="A rig by name or TOML file.")] = None,
    size: Annotated[
        str | None, typer.Option(help="A file of this size (240G) or density (3.5bpw).")
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Installed RAM that may hold weights.")] = None,
    ram_reserve: Annotated[
        str | None, typer.Option(help="RAM set aside (default: 4 GiB or 5%, the larger).")
    ] = None,
    reserve: Annotated[str | None, typer.Option(help="Set aside per GPU (default: auto).")] = None,
    desktop: Annotated[
        bool, typer.Option("--desktop", help="The first GPU drives a desktop: 800 MiB more.")
    ] = False,
    cpu: Annotated[
        str | None, typer.Option(help="CPU platform of the RAM, for speed: see `quantmix rigs`.")
    ] = None,
    cpu_cores: Annotated[int | None, typer.Option(help="Physical cores.")] = None,
    engine: Annotated[str, typer.Option(help="ik or mainline.")] = "ik",
    engine_build: Annotated[
        str | None, typer.Option(help="Date of the engine's build (default: newest known).")
    ] = None,
    ctx: Annotated[str, typer.Option(help="Context over all slots: 32768, 32k, or max.")] = "32768",
    ctk: Annotated[str, typer.Option(help="Type of the K cache.")] = "f16",
    ctv: Annotated[
        str | None, typer.Option(help="Type of the V cache (default: f16, or --ctk for MLA).")
    ] = None,
    ubatch: Annotated[int | None, typer.Option(help="Physical batch (default 512).")] = None,
    batch: Annotated[int | None, typer.Option(help="Logical batch (default 2048).")] = None,
    profile: Annotated[str | None, typer.Option(help="prompt or generate: chooses ubatch.")] = None,
    parallel: Annotated[int, typer.Option(help="Server slots.")] = 1,
    mla: Annotated[int, typer.Option(help="ik's MLA mode.")] = 3,
    amb: Annotated[int, typer.Option(help="ik's attention buffer, MiB.")] = 256,
    nkvo: Annotated[bool, typer.Option("--nkvo", help="KV cache in RAM.")] = False,
    mtp: Annotated[bool, typer.Option("--mtp", help="Load the multi-token block.")] = False,
    cram: Annotated[int, typer.Option(help="The server's prompt cache in RAM, MiB.")] = 0,
    types: Annotated[str | None, typer.Option(help="Only these types, comma separated.")] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="REGEX=TYPE: fix the type of tensors.")
    ] = None,
    floor: Annotated[
        list[str] | None, typer.Option(help="REGEX=TYPE: no worse than this type.")
    ] = None,
    no_imatrix: Annotated[
        bool, typer.Option("--no-imatrix", help="There is no importance matrix.")
    ] = False,
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
    measurements: Annotated[
        Path | None, typer.Option(help="Sensitivities measured by `quantmix measure`.")
    ] = None,
    own: Annotated[
        bool, typer.Option("--own", help="Calibrate on what `verify` stored of this GGUF's mixes.")
    ] = False,
    layout: Annotated[
        str | None, typer.Option(help="MLA layout of the source: split, ik or legacy.")
    ] = None,
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
    from quantmix.request import Request, fulfil

    values: dict[str, Any] = {
        k: v for k, v in locals().items() if k not in ("as_json", "quiet", "Request", "fulfil")
    }
    answer = fulfil(Request(**values))
    if as_json:
        print_json(answer.to_json())
    if not quiet:
        from quantmix.cli.summary import print_summary

        print_summary(console(), answer)


__all__ = ["Request", "register"]
