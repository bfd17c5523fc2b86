"""Run a pipeline: start what must run, where it runs, until nothing more can."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from quantmix.batch.executor import HEAVY, Executor, Message
from quantmix.batch.items import Inputs, Item, Judged, expand, judge, payload_of
from quantmix.batch.pipeline import Keep, Pipeline, Step
from quantmix.batch.publish import publish, recover, require_free_name
from quantmix.batch.state import Intent, State
from quantmix.errors import QuantmixError, UsageError
from quantmix.units import GIB, gib

_SPARE_BYTES: Final = 64 << 20
_STEP_MEMORY_BYTES: Final = GIB
"""Above a design and check of DeepSeek-R1 and Kimi-K2: 191 MiB, and 644 MiB for their engine."""


class Watcher(Protocol):
    """Is told what happens."""

    def started(self, item: Item, step: Step) -> None:
        """A step was started."""

    def progress(self, item: Item, step: Step, event: Mapping[str, Any]) -> None:
        """A running step tells how far it is."""

    def ended(self, item: Item, step: Step, seconds: float, reason: str) -> None:
        """A step ended; `reason` is empty when it went well."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run did with one step: `done` before, `ran`, `failed`, or `blocked`."""

    step: Step
    what: str
    seconds: float = 0.0
    reason: str = ""
    code: int = 0
    log: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """An item at the end of a run, with the results of its finished steps."""

    item: Item
    steps: tuple[Ran, ...]
    results: Mapping[str, Mapping[str, Any]]
    dropped: bool = False

    @property
    def failure(self) -> Ran | None:
        """The step that failed."""
        return next((s for s in self.steps if s.what == "failed"), None)


@dataclass
class Batch:
    """An opened pipeline; closes its state at the end of a `with` block."""

    pipeline: Pipeline
    state: State
    inputs: Inputs
    items: tuple[Item, ...]

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.state.close()

    @property
    def out(self) -> Path:
        """Folder of all outputs."""
        return self.state.out

    def judge(self, item: Item) -> list[Judged]:
        """Return whether each step of an item must run."""
        return judge(item, self.state, self.inputs, self.out)


def open_batch(pipeline: Pipeline, *, readonly: bool = False) -> Batch:
    """Open the state beside the outputs and finish what a kill left half named.

    Raises:
        UsageError: another batch works there; two budgets make one name.
    """
    state = State(pipeline.folder / pipeline.out, readonly=readonly)
    try:
        if not readonly:
            recover(state)
        inputs = Inputs(state, pipeline.folder)
        return Batch(pipeline, state, inputs, expand(pipeline, state))
    except BaseException:
        state.close()
        raise


@dataclass
class _Running:
    item: Item
    step: Step
    key: str
    disk_bytes: int


@dataclass
class _Run:
    """One run of a batch."""

    batch: Batch
    executor: Executor
    watcher: Watcher
    keep: Keep
    disk_bytes: int | None
    running: dict[int, _Running] = field(default_factory=dict)
    failed: dict[str, Ran] = field(default_factory=dict)
    ran: dict[tuple[str, str], float] = field(default_factory=dict)
    judged: dict[str, list[Judged]] = field(default_factory=dict)
    token: int = 0

    def go(self) -> tuple[Ended, ...]:
        for item in self.batch.items:
            self._judge(item)
        self._drop()
        while True:
            waiting = self._start_all()
            if not self.running:
                for item, need in waiting:
                    self._fail(item, "quantize", 0.0, need, 2, lasting=False)
                if not waiting:
                    break
                continue
            self._handle(self._next_message())
        return tuple(self._ended(item) for item in self.batch.items)

    # -- starting ---------------------------------------------------------------------------

    def _start_all(self) -> list[tuple[Item, str]]:
        """Start whatever may run; return items that wait for disk space, and why."""
        waiting: list[tuple[Item, str]] = []
        busy = {r.item.name for r in self.running.values()}
        for item in self.batch.items:
            if len(self.running) >= self.executor.slots:
                break
            due = self._due(item)
            if item.name in busy or due is None:
                continue
            heavy = sum(r.step in HEAVY for r in self.running.values())
            if due.step in HEAVY and heavy >= self.executor.heavy_slots:
                continue
            need = self._disk_need(item, due.step)
            short = self._disk_short(item, need) if need else ""
            if short:
                waiting.append((item, short))
                continue
            self._start(item, due, need)
        return waiting

    def _due(self, item: Item) -> Judged | None:
        if item.name in self.failed:
            return None
        return next((j for j in self.judged[item.name] if j.verdict == "run"), None)

    def _start(self, item: Item, due: Judged, need: int) -> None:
        self.token += 1
        payload = payload_of(item, due.step, due.key, self.batch.pipeline)
        payload["stage"] += f".{self.token}"
        payload["stage_in_out"] += f".{self.token}"
        payload["measured"] = self._measured(item)
        payload["made"] = self.batch.state.made(item.name)
        asked = {"memory": float(_STEP_MEMORY_BYTES), "disk": float(need)}
        resources = {k: v for k, v in {**asked, **payload["asked_resources"]}.items() if v}
        try:
            if due.step == "design":
                require_free_name(self.batch.out / item.name)
            self.batch.state.started(item.name, due.step, due.key)
            self.executor.submit(self.token, payload, resources)
        except QuantmixError as err:
            self._fail(item, due.step, 0.0, str(err), err.exit_code, lasting=False, key=due.key)
            return
        self.running[self.token] = _Running(item, due.step, due.key, need)
        self.watcher.started(item, due.step)

    def _measured(self, item: Item) -> Mapping[str, Any] | None:
        """Return what the verify step of an item found, for its report."""
        for j in self.judged[item.name]:
            if j.step == "verify" and j.verdict == "done" and j.last is not None:
                return j.last.result
        return None

    def _next_message(self) -> Message:
        while True:
            try:
                return self.executor.messages.get(timeout=0.5)  # so that Ctrl-C is heard
            except queue.Empty:
                continue

    # -- ending -----------------------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        run = self.running[message.token]
        if message.event is not None:
            self.watcher.progress(run.item, run.step, message.event)
            return
        assert message.outcome is not None
        del self.running[message.token]
        outcome = message.outcome
        if not outcome["ok"]:
            self._fail(
                *(run.item, run.step, outcome["seconds"], outcome["message"], outcome["code"]),
                lasting=outcome["lasting"],
                key=run.key,
            )
            return
        intent = Intent(
            *(run.item.name, run.step, run.key, outcome["seconds"]),
            result=outcome["result"],
            outputs=outcome["outputs"],
            moves=tuple((a, b) for a, b in outcome["moves"]),
        )
        self.batch.state.intend(intent)
        try:
            publish(self.batch.state, intent)
        except UsageError as err:
            self._fail(
                *(run.item, run.step, outcome["seconds"], str(err), err.exit_code),
                lasting=False,
                key=run.key,
            )
            return
        self.ran[run.item.name, run.step] = outcome["seconds"]
        self._judge(run.item)
        self.watcher.ended(run.item, run.step, outcome["seconds"], "")
        self._drop()

    def _fail(
        self,
        item: Item,
        step: Step,
        seconds: float,
        reason: str,
        code: int,
        *,
        lasting: bool,
        key: str = "",
    ) -> None:
        self.batch.state.failed(item.name, step, key, seconds, reason, code, lasting)
        self.failed[item.name] = Ran(step, "failed", seconds, reason, code)
        self.watcher.ended(item, step, seconds, reason)

    def _judge(self, item: Item) -> None:
        self.judged[item.name] = self.batch.judge(item)

    def _ended(self, item: Item) -> Ended:
        """Return what became of an item."""
        failure = self.failed.get(item.name)
        log = self.batch.state.folder / "logs" / item.name
        steps: list[Ran] = []
        results: dict[str, Mapping[str, Any]] = {}
        dropped = False
        stopped = False
        for j in self.judged[item.name]:
            if stopped:
                steps.append(Ran(j.step, "blocked"))
            elif failure is not None and j.step == failure.step:
                stopped = True
                path = log / f"{j.step}.log"
                steps.append(
                    Ran(
                        *(j.step, "failed", failure.seconds, failure.reason, failure.code),
                        log=str(path) if path.exists() else "",
                    )
                )
            elif j.verdict == "done":
                assert j.last is not None
                seconds = self.ran.get((item.name, j.step))
                what = "done" if seconds is None else "ran"
                steps.append(Ran(j.step, what, seconds or j.last.seconds))
                results[j.step] = j.last.result
                dropped |= j.step == "quantize" and not j.last.outputs
            else:
                stopped = True
                last = j.last
                steps.append(Ran(j.step, "failed", 0.0, j.reason, last.code if last else 1))
        return Ended(item, tuple(steps), results, dropped)

    # -- big files --------------------------------------------------------------------------

    def _disk_need(self, item: Item, step: Step) -> int:
        """Return the bytes that a step adds to the disk."""
        if step != "quantize":
            return 0
        design = self.batch.state.step(item.name, "design")
        return int(design.result["file_bytes"]) if design else 0

    def _disk_short(self, item: Item, need: int) -> str:
        """Return why a file cannot be written now, after dropping what may go."""
        reserved = sum(r.disk_bytes for r in self.running.values())
        short = self._short_by(need, reserved)
        if short and self.keep == "last":
            self._drop(before=item)
            short = self._short_by(need, reserved)
        return short

    def _short_by(self, need: int, reserved: int) -> str:
        used = sum(path.stat().st_size for _, path in self._big_files())
        if self.disk_bytes is not None and used + reserved + need > self.disk_bytes:
            return (
                f"the file takes {gib(need)}, the disk budget of {gib(self.disk_bytes)} has "
                f"{gib(max(0, self.disk_bytes - used - reserved))} left: raise disk, or --keep last"
            )
        free = shutil.disk_usage(self.batch.out).free
        if free < need + reserved + _SPARE_BYTES:
            return f"the file takes {gib(need)}, {self.batch.out} has {gib(free)} free"
        return ""

    def _big_files(self) -> list[tuple[Item, Path]]:
        files = [(i, self.batch.out / i.name / f"{i.name}.gguf") for i in self.batch.items]
        return [(i, f) for i, f in files if f.exists()]

    def _drop(self, before: Item | None = None) -> None:
        """Remove big files that `keep` does not keep, of items that are finished.

        `last` keeps the last made of a job (with `before`: none before that item), `best` the one
        nearest to its base: by KLD, else by perplexity, else by predicted damage.
        """
        if self.keep == "all":
            return
        for job in self.batch.pipeline.jobs:
            mine = [i for i in self.batch.items if i.job is job and self._quantized(i)]
            finished = [i for i in mine if all(j.verdict == "done" for j in self.judged[i.name])]
            if not finished:
                continue
            kept = mine[-1] if self.keep == "last" else min(finished, key=self._quality)
            for item in finished:
                pressed = before is not None and item.job is before.job
                if item is not kept or (pressed and before is not None and item is not before):
                    self._remove_big_file(item)

    def _quantized(self, item: Item) -> bool:
        judged = {j.step: j for j in self.judged[item.name]}
        made = judged.get("quantize")
        return made is not None and made.verdict == "done"

    def _quality(self, item: Item) -> float:
        results = {j.step: j.last.result for j in self.judged[item.name] if j.last is not None}
        measured = results.get("verify", {})
        found = [measured.get("kld"), measured.get("ppl"), results["design"]["damage"]]
        return float(next(x for x in found if x is not None))

    def _remove_big_file(self, item: Item) -> None:
        """Forget the file, then remove it; the next run removes what a kill between left."""
        made = self.batch.state.step(item.name, "quantize")
        assert made is not None
        if made.outputs:
            self.batch.state.rewritten(item.name, "quantize", {})
            self._judge(item)
        (self.batch.out / item.name / f"{item.name}.gguf").unlink(missing_ok=True)


def run(
    batch: Batch,
    make_executor: Callable[[], Executor],
    watcher: Watcher,
    *,
    keep: Keep,
    disk_bytes: int | None,
) -> tuple[Ended, ...]:
    """Run what must run; return what became of every item, in the pipeline's order.

    A failing step stops its own item only. Interrupted (KeyboardInterrupt), everything running is
    ended and what was finished is kept.

    Raises:
        EngineError, EngineMissing: the executor cannot be had.
    """
    judged = [batch.judge(item) for item in batch.items]
    executor = make_executor() if any_due(judged) else _Nothing()
    try:
        return _Run(batch, executor, watcher, keep, disk_bytes).go()
    finally:
        executor.stop()
        recover(batch.state)


def any_due(judged: Sequence[Sequence[Judged]]) -> bool:
    """Whether any step must run."""
    return any(j.verdict == "run" for steps in judged for j in steps)


class _Nothing:
    """An executor for when there is nothing to do: no process is started."""

    def __init__(self) -> None:
        self.slots = self.heavy_slots = 0
        self.messages: queue.Queue[Message] = queue.Queue()

    def submit(
        self, token: int, payload: Mapping[str, Any], resources: Mapping[str, float]
    ) -> None:
        raise UsageError("nothing is due, yet a step was submitted")

    def stop(self) -> None:
        """Nothing runs."""
