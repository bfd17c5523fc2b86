"""`quantmix measure`: how much each part of a model minds being quantized."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, one_of, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from quantmix.measurements import Measurements


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="measure",
        help="Sensitivity by hot swap in the loaded model: one role, band or tensor at a time. "
        "Resumable: run the same line again.",
        epilog="Example: quantmix measure smol-f16.gguf --imatrix smol.dat --by role "
        "--types iq2_kt,iq3_kt,iq4_ks,iq5_k --out smol-roles.json",
    )(answer_errors(measure))


def measure(
    source: Annotated[Path, typer.Argument(help="Unquantized GGUF (f16 or bf16).")],
    kinds: Annotated[str, typer.Option("--types", help="Types to try, comma separated.")],
    out: Annotated[Path, typer.Option("--out", help="Results file, for design --measurements.")],
    by: Annotated[str, typer.Option("--by", help="role, band or tensor.")] = "role",
    roles: Annotated[
        str, typer.Option("--roles", help="Only these roles, comma separated [default: all].")
    ] = "",
    bands: Annotated[int, typer.Option("--bands", min=1, help="Depth bands for --by band.")] = 3,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Text [default: the shipped probe text].")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="Importance matrix, .dat or GGUF.")
    ] = None,
    around: Annotated[
        Path | None,
        typer.Option("--around", help="Recipe that everything else has [default: unquantized]."),
    ] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=1, help="Chunks per probe.")] = 8,
    ctx: Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")] = 512,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: all]")] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Also the quantization error of every tensor.")
    ] = False,
    error_types: Annotated[
        str,
        typer.Option(
            help="Types to place without probes, by their quantization error on two layers a role."
        ),
    ] = "",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Plan the probes, run what is missing, print the table."""
    from quantmix import measure as work
    from quantmix.cli.progress import bar
    from quantmix.flag_texts import split_names
    from quantmix.ggml.weights import open_weights
    from quantmix.recipe import load
    from quantmix.texts import text

    scope = one_of("way to group tensors", by, work.SCOPES)
    asked, more = split_names(kinds), split_names(error_types)
    work.require_writable(more)  # before hours of probes
    groups = work.groups_of(
        open_weights(source),
        scope,
        asked,
        roles=split_names(roles),
        bands=bands,
    )
    mix: dict[str, str] = {}
    if around:
        mix = work.mix_of(load(around), open_weights(source))
    run = work.Run(
        source,
        corpus or text("probe"),
        imatrix,
        groups,
        mix,
        n_ctx=ctx,
        chunks=chunks,
        threads=threads,
    )
    screen = console(quiet)
    with bar(screen, "measuring", "probe") as tick:
        results = work.measure(run, out, tick)
    if errors:
        with bar(screen, "quantizing", "job") as tick:
            results = work.add_errors(run, results, out, asked, on_event=tick)
    if more:
        with bar(screen, "quantizing", "job") as tick:
            results = work.add_errors(run, results, out, [*asked, *more], layers=2, on_event=tick)
    if as_json:
        print_json(_document(results, out))
    _show(results, asked, screen)


def _document(results: Measurements, out: Path) -> dict[str, Any]:
    """Return what `--json` prints: the file's content with its place."""
    from dataclasses import asdict

    return {"file": str(out), **asdict(results)}


def _show(results: Measurements, asked: Sequence[str], screen: Console) -> None:
    """Print a table: rows are groups, columns types, cells KLD in nats."""
    from rich.table import Table

    table = Table(
        title=f"KLD in nats, measured on {results.tokens} tokens "
        f"(noise of a repeated base pass {results.noise_floor:.1e})"
    )
    table.add_column("role")
    table.add_column("layers")
    for kind in asked:
        table.add_column(kind, justify="right")
    cells = {(p.role, p.layers, p.type): f"{p.kld:.4f}" for p in results.probes}
    cells |= {(f.role, f.layers, f.type): "failed" for f in results.failed}
    for role, layers in dict.fromkeys((r, la) for r, la, _ in cells):
        span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else ",".join(map(str, layers))
        table.add_row(role, span, *(cells.get((role, layers, k), "") for k in asked))
    screen.print(table)
    for f in results.failed:
        screen.print(f"failed: {f.role} {f.type}: {f.why}")
