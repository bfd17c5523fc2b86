"""The same pipeline on a Dask cluster: two workers, one of them killed, the same bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantmix.batch.cluster import run_on_worker

from .runs import CATALOG, REAL, Finished, batch, command, finished, new_folder, statuses, tree

pytest.importorskip("distributed")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Cluster:
    """A scheduler and workers in processes of their own."""

    def __init__(self, scratch: Path) -> None:
        self.url = f"tcp://127.0.0.1:{free_port()}"
        self._scratch = scratch
        self._processes: list[subprocess.Popen[bytes]] = []
        port = self.url.rpartition(":")[2]
        flags = ("--host", "127.0.0.1", "--port", port, "--no-dashboard")
        self._start("dask_scheduler", *flags)

    def worker(self, *flags: str) -> subprocess.Popen[bytes]:
        """Start a worker of one thread."""
        return self._start("dask_worker", self.url, "--no-nanny", "--nthreads", "1", *flags)

    def stop(self) -> None:
        """Kill everything."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, module: str, *args: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", *args],
            cwd=self._scratch,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        return process


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler without workers yet."""
    scratch = tmp_path / "dask"
    scratch.mkdir()
    made = Cluster(scratch)
    yield made
    made.stop()


@pytest.mark.slow
@pytest.mark.engine
def test_two_workers_give_the_bytes_of_a_local_run(
    tmp_path: Path, models: Path, cluster: Cluster
) -> None:
    """Killing a worker while it works loses no step: the other one does it again."""
    here = new_folder(tmp_path / "here", REAL, models)
    assert batch(here).code == 0
    there = new_folder(tmp_path / "there", REAL, models)
    victim = cluster.worker()
    running = subprocess.Popen(
        command(str(there / "pipeline.toml"), "--scheduler", cluster.url, "--quiet")
    )
    stage = there / "recipes" / ".quantmix" / "stage"
    until = time.monotonic() + 60
    while not (stage.exists() and any(stage.iterdir())) and time.monotonic() < until:
        time.sleep(0.02)
    assert running.poll() is None
    victim.send_signal(signal.SIGKILL)
    cluster.worker()
    cluster.worker()
    assert running.wait(300) == 0
    assert tree(there / "recipes") == tree(here / "recipes")
    assert set(finished(there / "recipes").values()) == {1}
    again: Finished = batch(there, "--scheduler", cluster.url)
    assert statuses(again.document) == {"done": 12}


@pytest.mark.slow
def test_resources_decide_where_steps_run(tmp_path: Path, cluster: Cluster) -> None:
    """A step that asks for what no worker has fails with the flag to start one; others run."""
    cluster.worker("--resources", "memory=8e9")
    text = CATALOG.replace(
        '"--size 3.5bpw"]', '"--size 3.5bpw"]\nresources = { check = { GPU = 1 } }'
    )
    place = new_folder(tmp_path / "p", text)
    done = batch(place, "--scheduler", cluster.url)
    assert done.code == 2
    assert statuses(done.document) == {"ran": 4, "failed": 2}
    assert "no worker has GPU = 1 for check" in done.document["items"][0]["reason"]


@pytest.mark.slow
def test_nobody_answers(tmp_path: Path) -> None:
    """A wrong address is exit 4 and one line."""
    place = new_folder(tmp_path / "p", CATALOG)
    done = batch(place, "--quiet", "--scheduler", f"tcp://127.0.0.1:{free_port()}")
    assert done.code == 4
    assert "no Dask scheduler answers" in done.errors
    assert "Traceback" not in done.errors


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": "0.0.0"}, "the batch 0.0.0"), ({"folder": "/nowhere/at/all"}, "does not see")],
)
def test_workers_that_cannot_help_say_so(change: dict[str, str], words: str) -> None:
    """Another version or a folder that is not shared is an outcome with the reason."""
    import quantmix

    payload = {"version": quantmix.__version__, "folder": os.getcwd(), **change}
    outcome = run_on_worker(payload)
    assert not outcome["ok"]
    assert words in outcome["message"]
