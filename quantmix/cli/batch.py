"""`quantmix batch`: many models × budgets × steps, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantmix.cli.common import JsonFlag, QuietFlag, answer_errors, console, one_of, print_json

if TYPE_CHECKING:
    from quantmix.batch.executor import Executor
    from quantmix.batch.run import Batch


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        name="batch",
        help="Run a pipeline file: many models × budgets × steps (design, check, quantize, "
        "verify, report). A rerun does only what is missing or changed; a kill loses no finished "
        "step.",
        epilog="Example: quantmix batch pipeline.toml --jobs 2 --keep last",
    )(answer_errors(batch))


def batch(
    pipeline: Annotated[Path, typer.Argument(help="Pipeline file (TOML).")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would run, how long, how large.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Worker processes here.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="A Dask scheduler instead: tcp://host:8786.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", help="Big files per job: last, best or all [default: all]."),
    ] = None,
    disk: Annotated[
        str | None, typer.Option("--disk", help="Most that big files may take together: 500G.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Load, plan, run, sum up."""
    from quantmix.batch.pipeline import KEEPS, load
    from quantmix.batch.run import open_batch, run
    from quantmix.batch.summary import exit_code, plan_document, run_document
    from quantmix.cli.batch_view import print_plan, print_summary, watching
    from quantmix.units import parse_size

    screen = console(quiet)
    loaded = load(pipeline)
    kept = one_of("value of --keep", keep, KEEPS) if keep else loaded.keep
    disk_bytes = parse_size(disk, "--disk") if disk else loaded.disk_bytes
    with _stoppable(), open_batch(loaded, readonly=dry_run) as opened:
        plan = plan_document(opened)
        print_plan(screen, plan, reasons=dry_run)
        if dry_run:
            if as_json:
                print_json(plan)
            return
        with watching(screen, plan) as watcher:
            ended = run(
                opened,
                lambda: _executor(opened, jobs, scheduler),
                watcher,
                keep=kept,
                disk_bytes=disk_bytes,
            )
        document = run_document(opened, ended)
    if as_json:
        print_json(document)
    print_summary(screen, document)
    code = exit_code(ended)
    if code:
        raise typer.Exit(code)


def _executor(opened: Batch, jobs: int, scheduler: str | None) -> Executor:
    """Return where the steps will run."""
    folder = opened.pipeline.folder
    if scheduler is not None:
        from quantmix.batch.cluster import DaskExecutor

        return DaskExecutor(scheduler, folder)
    from quantmix.batch.executor import LocalExecutor

    return LocalExecutor(folder, jobs)


class _stoppable:
    """Treat SIGTERM (a job scheduler's wish) like Ctrl-C: end what runs, keep what is finished."""

    def __enter__(self) -> None:
        import signal

        def stop(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        self._before = signal.signal(signal.SIGTERM, stop)

    def __exit__(self, *_: object) -> None:
        import signal

        signal.signal(signal.SIGTERM, self._before)
