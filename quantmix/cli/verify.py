"""`quantmix verify`: measure a file and hold it against its prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, one_of, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from quantmix.verify import Verified


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="verify",
        help="Perplexity, and KL divergence against --base, of a GGUF or a recipe's file; "
        "stored, and compared with the prediction.",
        epilog="Example: quantmix verify recipes/smol-4.5bpw --corpus wiki.test.raw "
        "--base smol-f16.gguf --measurements roles.json --imatrix smol.dat",
    )(answer_errors(verify))


def verify(
    target: Annotated[Path, typer.Argument(help="GGUF, or recipe folder with its file in it.")],
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="Text file [default: the shipped test text].")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Unquantized GGUF, for the KL divergence.")
    ] = None,
    logits_base: Annotated[
        Path | None,
        typer.Option("--logits-base", help="Base log-probabilities: reused, or written once."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe that promised this file.")
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=8, help="Tokens per chunk.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", min=1, help="At most so many chunks [default: all].")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="[default: all]")] = None,
    engine: Annotated[str, typer.Option("--engine", help="ik or mainline.")] = "ik",
    llama_bin: Annotated[
        Path | None,
        typer.Option("--llama-bin", help="Use your own llama-perplexity from this folder (GPU)."),
    ] = None,
    db: Annotated[
        Path | None, typer.Option("--db", help="Measurements store [default: QUANTMIX_DB].")
    ] = None,
    measurements: Annotated[
        Path | None,
        typer.Option(
            "--measurements",
            help="What `quantmix measure` wrote for --base: predicts the KLD on this text, "
            "for one more pass and, without --logits-base, temporary disk.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", help="The imatrix of --measurements.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 5 when the prediction missed.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure with progress, print, judge."""
    from quantmix import verify as work
    from quantmix.cli.progress import bar
    from quantmix.errors import CheckFailed
    from quantmix.ggml.types import ENGINES
    from quantmix.texts import text

    known = one_of("engine", engine, ENGINES)
    screen = console(quiet)
    with bar(screen, "verifying", "chunk") as tick:
        found = work.verify(
            work.find_target(target, recipe),
            corpus or text("test"),
            base=base,
            logits_base=logits_base,
            n_ctx=ctx,
            chunks=chunks,
            threads=threads,
            engine=known,
            llama_bin=llama_bin,
            db=db,
            probed=measurements,
            imatrix=imatrix,
            on_event=tick,
        )
    if as_json:
        print_json(found.to_json())
    _show(found, screen)
    if found.kld_error:
        raise found.kld_error
    if strict and found.predicted and found.predicted.holds is False:
        raise CheckFailed("the measured perplexity lies outside the predicted interval")


def _show(found: Verified, screen: Console) -> None:
    """Print the figures for people."""
    e = found.evaluation
    screen.print(
        f"{found.weights.path.name}: PPL {e.perplexity.ppl:.4f} ± {e.perplexity.ppl_err:.4f} "
        f"({e.chunks} chunks of {e.n_ctx}, {e.perplexity.tokens} tokens scored, "
        f"{e.engine.name} {e.engine.build}, {e.seconds:.0f} s)"
    )
    if e.divergence and e.log_ratio:
        d = e.divergence
        screen.print(
            f"against the base: KLD {d.mean:.5f} ± {d.err:.5f}, median {d.median:.5f}, "
            f"p99 {d.p99:.4f}, max {d.max:.3f}, same top token {100 * d.same_top:.2f}%, "
            f"ln(PPL/base) {e.log_ratio.mean:+.5f} ± {e.log_ratio.err:.5f}"
        )
    for note in found.notes:
        screen.print(f"note: {note}", style="yellow", markup=False)
    if found.kld_here and e.divergence:
        k = found.kld_here
        screen.print(
            f"predicted KLD {k.kld:.4f} [{k.kld_low:.4f}, {k.kld_high:.4f}], measured "
            f"{e.divergence.mean:.4f} ({k.probes_kld:.4f} on the text of the probes, times "
            f"{k.text_factor:.3f}: what this text does to a mix of other types)",
        )
    p = found.predicted
    if p is None or p.ppl is None:
        return
    span = f" [{p.ppl_low:.4f}, {p.ppl_high:.4f}]" if p.ppl_low and p.ppl_high else ""
    screen.print(
        f"predicted {p.ppl:.4f}{span}, measured {e.perplexity.ppl:.4f}",
        soft_wrap=True,
    )
    if p.holds is False:
        screen.print(
            f"THE PREDICTION MISSED: the measured value lies outside the {100 * p.interval:.0f}% "
            "interval; it is remembered, and `design --own` learns from three such files"
        )
    elif p.holds is None:
        screen.print(
            "not comparable: the prediction is for other text than was measured; give the "
            "unquantized GGUF by --base to compare here"
        )
