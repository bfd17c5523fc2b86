"""`quantmix quantize`: make the file a recipe promises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="quantize",
        help="Run llama-quantize by a recipe, then compare the file with it, tensor by tensor.",
        epilog="Example: quantmix quantize recipes/smol-4.5bpw smol-f16.gguf --imatrix smol.dat",
    )(answer_errors(quantize))


def quantize(
    recipe: Annotated[Path, typer.Argument(help="Recipe folder or recipe.json.")],
    source: Annotated[Path, typer.Argument(help="Unquantized GGUF (first shard of a split one).")],
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="Importance matrix, .dat or GGUF.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write [default: in the recipe folder].")
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept an already quantized source.")
    ] = False,
    split_max_size: Annotated[
        str | None, typer.Option("--split-max-size", help="Cut into shards: 48G, 800M, …")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: all]")] = None,
    llama_bin: Annotated[
        Path | None, typer.Option("--llama-bin", help="Folder of your own llama-quantize.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Preflight, run with progress, print what was written."""
    from quantmix.cli.progress import bar
    from quantmix.engine import quantize as work
    from quantmix.recipe import load
    from quantmix.units import gib, parse_size

    loaded = load(recipe)
    folder = recipe if recipe.is_dir() else recipe.parent
    plan = work.preflight(
        loaded,
        source,
        out or folder / f"{loaded.name or folder.name}.gguf",
        imatrix=imatrix,
        allow_requantize=allow_requantize,
        split_max_bytes=parse_size(split_max_size, "--split-max-size") if split_max_size else None,
        llama_bin=llama_bin,
    )
    screen = console(quiet)
    for warning in plan.warnings:
        screen.print(f"warning: {warning}")
    with bar(screen, "quantizing", "tensor") as tick:
        made = work.quantize(plan, threads=threads, on_event=tick)
    if as_json:
        print_json(
            {
                "file": str(made.path),
                "files": [str(f) for f in made.files],
                "tensors": made.n_tensors,
                "tensor_bytes": made.tensor_bytes,
                "file_bytes": made.file_bytes,
                "types_differing": 0,
                "bytes_differing": 0,
                "warnings": list(made.warnings),
                "seconds": made.seconds,
            }
        )
    screen.print(
        f"{made.path}: {gib(made.file_bytes)}, {made.n_tensors} tensors, types and bytes equal "
        f"the recipe ({made.seconds:.0f} s)"
    )
