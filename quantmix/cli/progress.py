"""One progress bar for the long commands: fed with the events of the engine's tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Tick = Callable[[dict[str, Any]], None]


@contextmanager
def bar(screen: Console, title: str, counter: str) -> Iterator[Tick]:
    """Yield a function that takes events `{counter: i, "of": n, …}`; time left is shown.

    Nothing is drawn when the console is quiet or no terminal.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown = screen.is_terminal and not screen.quiet
    with Progress(*columns, console=screen, transient=True, disable=not shown) as progress:
        task = progress.add_task(title, total=None)

        def tick(event: dict[str, Any]) -> None:
            if counter in event:
                progress.update(
                    task,
                    total=event["of"],
                    completed=event[counter],
                    description=f"{title} {_detail(event)}".rstrip(),
                )

        yield tick


def _detail(event: dict[str, Any]) -> str:
    """Return what is worth seeing of an event."""
    if event.get("ppl") is not None:
        return f"PPL {event['ppl']:.4f}"
    if "role" in event:
        layers = f" {event['layers']}" if event.get("layers") else ""
        return f"{event['role']}{layers} {event['type']}"
    return str(event.get("name") or event.get("tensor") or "")
