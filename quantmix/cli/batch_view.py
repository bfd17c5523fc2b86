"""How a batch looks: the plan, live progress on a terminal or plain lines, the summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantmix.cli.common import wide
from quantmix.units import gib

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from quantmix.batch.items import Item
    from quantmix.batch.run import Watcher

# What became of a step, and its style.
_MARKS = {
    "done": ("·", "dim"),
    "run": ("run", "cyan"),
    "later": ("run", "cyan"),
    "failed": ("failed", "red"),
    "blocked": ("-", "red"),
    "ran": ("ran", "green"),
}
_ROWS = 60  # more items than this are summed up, not listed


def print_plan(screen: Console, plan: Mapping[str, Any], *, reasons: bool = False) -> None:
    """Print what would run; with `reasons` why what would fail does."""
    from rich.text import Text

    counts = plan["counts"]
    todo = counts["run"] + counts["later"]
    text = f": {len(plan['items'])} recipes, {sum(counts.values())} steps: "
    text += f"{counts['done']} up to date, {todo} to run"
    text += f", {counts['failed']} would fail" if counts["failed"] else ""
    screen.print(Text.assemble((plan["pipeline"], "bold"), text))
    if reasons:
        for row, step in ((r, s) for r in plan["items"] for s in r["steps"]):
            if step["plan"] == "failed":
                line = f" {step['step']}: {step['reason']}"
                screen.print(Text.assemble((_name(row), "red"), line))
    if todo == 0:
        return
    screen.print(
        f"about {duration(plan['seconds'])} of work, "
        f"{gib(plan['file_bytes'])} of quantized files at most"
    )
    shown = [row for row in plan["items"] if any(s["plan"] != "done" for s in row["steps"])]
    table = _table("recipe", *_steps(plan), "about", "file")
    for row in shown[:_ROWS]:
        table.add_row(
            _name(row),
            *_marks(row, "plan", _steps(plan)),
            duration(row["seconds"]),
            gib(row["file_bytes"]) if row["file_bytes"] else "",
        )
    wide(screen).print(table)
    if len(shown) > _ROWS:
        screen.print(f"… and {len(shown) - _ROWS} more", style="dim")


def print_summary(screen: Console, document: Mapping[str, Any]) -> None:
    """Print what became of it, reasons of failures in full."""
    from rich.text import Text

    counts = document["counts"]
    if len(document["items"]) <= _ROWS:
        wide(screen).print(_summary_table(document))
    for row in document["items"]:
        if not row["ok"]:
            log = next((s["log"] for s in row["steps"] if s["log"]), "")
            more = f" (log: {log})" if log else ""
            screen.print(Text.assemble((_name(row), "red"), f" {row['reason']}{more}"))
        for warning in row["warnings"]:
            screen.print(f"{_name(row)}: warning: {warning}")
    screen.print(
        f"{counts['ran']} steps ran, {counts['done']} were up to date, {counts['failed']} failed, "
        f"{counts['blocked']} not tried"
    )


def _summary_table(document: Mapping[str, Any]) -> Any:
    table = _table("recipe", *_steps(document), "size", "bpw", "PPL predicted", "PPL", "KLD")
    for row in document["items"]:
        table.add_row(
            _name(row),
            *_marks(row, "status", _steps(document)),
            gib(row["tensor_bytes"]) if row["tensor_bytes"] else "",
            f"{row['bpw']:.3f}" if row["bpw"] else "",
            f"{row['ppl_predicted']:.3f}" if row["ppl_predicted"] else "",
            f"{row['ppl']:.4f}" if row["ppl"] else "",
            f"{row['kld']:.5f}" if row["kld"] is not None else "",
        )
    return table


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold"
        )
    return table


def _marks(row: Mapping[str, Any], key: str, steps: Sequence[str]) -> list[Any]:
    """Return the cells of a row that say what becomes of each of `steps`."""
    from rich.text import Text

    marks = {s["step"]: Text(*_MARKS[s[key]]) for s in row["steps"]}
    return [marks.get(s, "") for s in steps]


def _steps(document: Mapping[str, Any]) -> list[str]:
    """Return the steps that occur, in running order."""
    from quantmix.batch.pipeline import STEPS

    used = {s["step"] for row in document["items"] for s in row["steps"]}
    return [s for s in STEPS if s in used]


def _name(row: Mapping[str, Any]) -> str:
    return str(row["recipe"]).rpartition("/")[2]


def duration(seconds: float) -> str:
    """Return seconds as people read them: 8 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def watching(screen: Console, plan: Mapping[str, Any]) -> Iterator[Watcher]:
    """Yield a watcher: live bars on a terminal, one plain line per finished step elsewhere."""
    total = plan["counts"]["run"] + plan["counts"]["later"]
    if not screen.is_terminal or screen.quiet or not total:
        yield _Lines(screen, total)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    with Progress(*columns, TimeElapsedColumn(), console=screen, transient=True) as progress:
        yield _Bars(screen, progress, total)


class _Lines:
    """Plain lines."""

    def __init__(self, screen: Console, total: int) -> None:
        self._screen, self._total, self._n = screen, total, 0

    def started(self, item: Item, step: str) -> None:
        """Nothing is printed before a step ends."""

    def progress(self, item: Item, step: str, event: Mapping[str, Any]) -> None:
        """Progress inside a step is for terminals."""

    def ended(self, item: Item, step: str, seconds: float, reason: str) -> None:
        """One line per step."""
        self._n += 1
        how = f"FAILED: {reason}" if reason else f"{seconds:.1f} s"
        self._screen.print(
            f"[{self._n}/{self._total}] {item.name} {step} {how}",
            soft_wrap=True,
        )


class _Bars(_Lines):
    """A bar for everything and one for each running step; finished steps scroll away above."""

    def __init__(self, screen: Console, progress: Progress, total: int) -> None:
        super().__init__(screen, total)
        self._progress = progress
        self._all = progress.add_task("batch", total=total, count=f"0/{total}")
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def started(self, item: Item, step: str) -> None:
        """Show a bar."""
        self._tasks[item.name, step] = self._progress.add_task(
            f"  {item.name} {step}", total=None, count=""
        )

    def progress(self, item: Item, step: str, event: Mapping[str, Any]) -> None:
        """Fill it by tensors or chunks."""
        done = event.get("tensor", event.get("chunk"))
        if done is not None and (item.name, step) in self._tasks:
            task = self._tasks[item.name, step]
            of = event.get("of")
            self._progress.update(task, completed=done, total=of, count=f"{done}/{of}")

    def ended(self, item: Item, step: str, seconds: float, reason: str) -> None:
        """Remove it, count the step."""
        task = self._tasks.pop((item.name, step), None)
        if task is not None:
            self._progress.remove_task(task)
        super().ended(item, step, seconds, reason)
        count = f"{self._n}/{self._total}"
        self._progress.update(self._all, completed=self._n, count=count)
