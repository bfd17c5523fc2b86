"""`quantmix refine`: measured improvement of a recipe at equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from quantmix.refine.request import Outcome, Prepared


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="refine",
        help="Measured improvement of a recipe at equal bytes: probes around the recipe's own "
        "types, swaps, and a judgement on held-out text. Resumable: run the same line again.",
        epilog="Example: quantmix refine recipes/smol-3.0bpw smol-f16.gguf --imatrix smol.dat",
    )(answer_errors(refine))


def refine(
    recipe: Annotated[Path, typer.Argument(help="Recipe folder or recipe.json.")],
    source: Annotated[Path, typer.Argument(help="Unquantized GGUF (f16 or bf16).")],
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="Importance matrix, .dat or GGUF.")
    ] = None,
    measurements: Annotated[
        Path | None,
        typer.Option("--measurements", help="What `quantmix measure` wrote for the source."),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="What is probed: role, band or tensor.")] = "band",
    bands: Annotated[int, typer.Option("--bands", min=1, help="Depth bands for --by band.")] = 2,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Probe and swap so many times at most.")
    ] = 1,
    types: Annotated[
        str, typer.Option("--types", help="Only these types [default: those of the recipe].")
    ] = "",
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Text [default: the shipped probe text].")
    ] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=2, help="Chunks per probe.")] = 8,
    held_out: Annotated[
        int, typer.Option("--held-out", min=4, help="Chunks after those, to judge by.")
    ] = 16,
    ctx: Annotated[int, typer.Option("--ctx", min=32, help="Tokens per chunk.")] = 512,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: all]")] = None,
    probes: Annotated[
        Path | None,
        typer.Option("--probes", help="File of scores so far [default: NAME.probes.json]."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for recipes [default: beside RECIPE].")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the new recipe [default: NAME-refined].")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Prepare, say what it costs, refine, print."""
    from quantmix.cli.common import one_of
    from quantmix.cli.progress import bar
    from quantmix.measure import SCOPES
    from quantmix.refine import request as work
    from quantmix.refine.search import Settings
    from quantmix.refine.worker import Job
    from quantmix.texts import text

    job = Job(
        recipe=recipe,
        source=source,
        corpus=corpus or text("probe"),
        imatrix=imatrix,
        measurements=measurements,
        types=tuple(t.strip() for t in types.split(",") if t.strip()),
        settings=Settings(chunks, held_out, rounds, one_of("way to probe", by, SCOPES), bands),
        n_ctx=ctx,
        threads=threads,
    )
    prepared = work.prepare(job, out=out, name=name, file=probes)
    screen = console(quiet)
    _announce(prepared, screen)
    with bar(screen, "refining", "mix") as tick:
        found = work.refine(prepared, tick)
    if as_json:
        print_json(found.to_json())
    _show(found, screen)


def _announce(prepared: Prepared, screen: Console) -> None:
    """Say what it costs before it starts."""
    settings, known = prepared.job.settings, len(prepared.known.scores)
    screen.print(
        f"{prepared.recipe.name}: at most {prepared.mixes} mixes on {settings.chunks} chunks, the "
        f"last two on {settings.held_out} held-out ones; about "
        f"{prepared.minutes} min{f', less {known} scores that are known' if known else ''}. "
        f"Scores are kept in {prepared.file}",
        markup=False,
    )


def _show(found: Outcome, screen: Console) -> None:
    """Print rounds, swaps and the verdict for people."""
    from rich.table import Table

    for number, r in enumerate(found.found.rounds, 1):
        table = Table(title=f"round {number}: change of KLD in nats, measured (predicted)")
        for head in ("role", "layers", "up", "down"):
            table.add_column(head, justify="left" if head in ("role", "layers") else "right")
        cells = {(p.part, p.way): f"{p.change:+.4f} ({p.predicted:+.4f})" for p in r.probes}
        for i, part in enumerate(r.parts):
            span = f"{part.layers[0]}-{part.layers[-1]}" if part.layers else ""
            table.add_row(part.role, span, cells.get((i, 1), ""), cells.get((i, -1), ""))
        screen.print(table)
        for expected, measured in zip(r.expected, r.measured, strict=True):
            seen = f"{measured.mean:+.5f} ± {measured.err:.5f}" if measured else "failed"
            screen.print(f"mix: expected {expected:+.5f}, measured {seen}", markup=False)
    screen.print(found.verdict, markup=False)
    if found.folder:
        screen.print(f"Written  {found.folder}/", markup=False)
    for note in found.notes:
        screen.print(f"note: {note}", markup=False)
