"""Where steps run: worker processes of this machine. (A cluster: see cluster.py.)"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from quantmix.batch.stepprocess import StepProcess

HEAVY: Final = ("quantize", "verify")
"""Steps that fill a whole machine: cores, memory, disk."""


@dataclass(frozen=True, slots=True)
class Message:
    """News of a submitted step: an event while it runs, then its outcome."""

    token: int
    event: Mapping[str, Any] | None = None
    outcome: dict[str, Any] | None = None


class Executor(Protocol):
    """Runs steps; news arrive in `messages`."""

    messages: queue.Queue[Message]

    @property
    def slots(self) -> int:
        """Steps that may be submitted at once."""

    @property
    def heavy_slots(self) -> int:
        """Heavy steps among them."""

    def submit(
        self, token: int, payload: Mapping[str, Any], resources: Mapping[str, float]
    ) -> None:
        """Start a step."""

    def stop(self) -> None:
        """End everything that runs."""


class LocalExecutor:
    """`jobs` worker processes; a heavy step uses all cores, so there is one at a time."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.slots = jobs
        self.heavy_slots = 1
        self.messages: queue.Queue[Message] = queue.Queue()
        self._todo: queue.Queue[tuple[int, Mapping[str, Any]] | None] = queue.Queue()
        self._processes = [StepProcess(folder) for _ in range(jobs)]
        self._threads = [
            threading.Thread(target=self._work, args=(p,), daemon=True) for p in self._processes
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, token: int, payload: Mapping[str, Any], resources: Mapping[str, float]
    ) -> None:
        """Start a step; a machine's own resources are not counted."""
        self._todo.put((token, payload))

    def stop(self) -> None:
        """End all worker processes."""
        for _ in self._threads:
            self._todo.put(None)
        stopping = [threading.Thread(target=p.stop) for p in self._processes]
        for thread in stopping:
            thread.start()
        for thread in (*stopping, *self._threads):
            thread.join()

    def _work(self, process: StepProcess) -> None:
        while (order := self._todo.get()) is not None:
            token, payload = order

            def tell(event: dict[str, Any], token: int = token) -> None:
                self.messages.put(Message(token, event=event))

            self.messages.put(Message(token, outcome=process.run(payload, tell)))
