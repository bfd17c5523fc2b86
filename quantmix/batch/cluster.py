"""Steps on an existing Dask cluster: the same step processes, started by its workers.

Workers need the same quantmix and engine, and the pipeline's folder under the same path. Dask
runs a step again when its worker is lost; attempts have stages of their own, and only this process
gives outputs their names, so a lost attempt leaves nothing.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import quantmix
from quantmix.batch.executor import Message
from quantmix.batch.stepprocess import StepProcess
from quantmix.batch.steps import failed
from quantmix.errors import EngineError, EngineMissing, UsageError

_RETRIES: Final = 3
_CONNECT_SECONDS: Final = 8

_idle: dict[str, list[StepProcess]] = {}
_idle_lock = threading.Lock()


def run_on_worker(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Do one step on a worker of the cluster, in a step process that stays for the next one."""
    mine = quantmix.__version__
    if mine != payload["version"]:
        return failed(f"a worker has quantmix {mine}, the batch {payload['version']}", 4)
    folder = payload["folder"]
    if not Path(folder).is_dir():
        return failed(f"a worker does not see {folder}: share it under the same path", 4)
    attempt = uuid.uuid4().hex[:8]
    own = {**payload, "stage": f"{payload['stage']}-{attempt}"}
    own["stage_in_out"] = f"{payload['stage_in_out']}-{attempt}"
    with _idle_lock:
        waiting = _idle.setdefault(folder, [])
        process = waiting.pop() if waiting else StepProcess(Path(folder))
    outcome = process.run(own, lambda event: None)
    with _idle_lock:
        _idle[folder].append(process)
    return outcome


class DaskExecutor:
    """Submits steps to the scheduler at `url`.

    Raises:
        EngineMissing: `distributed` is not installed.
        EngineError: nobody answers there.
    """

    def __init__(self, url: str, folder: Path) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise EngineMissing(
                "--scheduler needs Dask: install it with `pip install quantmix[cluster]`"
            ) from None
        try:
            self._client = Client(url, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as err:
            raise EngineError(f"no Dask scheduler answers at {url}: {err}") from err
        self._folder = str(folder)
        self._futures: dict[int, Any] = {}
        self.messages: queue.Queue[Message] = queue.Queue()

    @property
    def slots(self) -> int:
        """Two steps per thread of the cluster: none waits for this process."""
        threads: int = sum(w["nthreads"] for w in self._workers().values())
        return 2 * max(1, threads)

    @property
    def heavy_slots(self) -> int:
        """As many: the workers' resources and threads say what runs at once."""
        return self.slots

    def submit(
        self, token: int, payload: Mapping[str, Any], resources: Mapping[str, float]
    ) -> None:
        """Submit a step with the resources that workers of this cluster declare.

        Raises:
            UsageError: resources that a job asks for and no worker has.
        """
        future = self._client.submit(
            run_on_worker,
            {**payload, "folder": self._folder},
            key=f"quantmix-{payload['recipe']}-{payload['step']}-{uuid.uuid4().hex[:8]}",
            resources=self._declared(payload, resources) or None,
            retries=_RETRIES,
            pure=False,
        )
        self._futures[token] = future
        future.add_done_callback(lambda done: self._finished(token, done))

    def stop(self) -> None:
        """Cancel what has not ended and leave the cluster as it was."""
        for future in self._futures.values():
            future.cancel()
        self._client.close()

    def _workers(self) -> Mapping[str, Any]:
        workers: Mapping[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return workers

    def _declared(
        self, payload: Mapping[str, Any], resources: Mapping[str, float]
    ) -> dict[str, float]:
        """Return those resources that workers count; one that a job names must be among them."""
        largest: dict[str, float] = {}
        for worker in self._workers().values():
            for name, amount in worker["resources"].items():
                largest[name] = max(amount, largest.get(name, 0.0))
        for name, amount in payload["asked_resources"].items():
            if amount > largest.get(name, 0.0):
                raise UsageError(
                    f"no worker has {name} = {amount:g} for {payload['step']} of "
                    f"{payload['recipe']}: start one with --resources '{name}={amount:g}'"
                )
        return {k: v for k, v in resources.items() if k in largest}

    def _finished(self, token: int, future: Any) -> None:
        """Hand the outcome over; a step whose workers all died failed."""
        self._futures.pop(token, None)
        if future.cancelled():
            return
        try:
            outcome = future.result()
        except Exception as err:
            outcome = failed(f"the cluster lost the step: {type(err).__name__}: {err}", 4)
        self.messages.put(Message(token, outcome=outcome))
