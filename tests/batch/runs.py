"""Pipelines to try batch on: started as people start it, killed, compared byte by byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny import write_tiny

CATALOG = """
[defaults]
ctx = 4096

[[job]]
model = "qwen3-0.6b"
budgets = ["--vram 2G", "--size 3.5bpw"]

[[job]]
model = "llama-3.2-1b"
budgets = ["--vram 3G"]
"""

REAL = """
[defaults]
ctx = 4096

[[job]]
model = "qwen3-0.6b"
budgets = ["--vram 2G"]
steps = ["design", "check"]

[[job]]
model = "models/tiny.gguf"
imatrix = "models/tiny.dat"
corpus = "models/text.txt"
budgets = ["--size 6.5bpw", "--size 8bpw"]
steps = ["design", "check", "quantize", "verify", "report"]
types = "q8_0,q6_K,q5_0,q4_0"
db = "measured.db"
threads = 1
"""

_TIMES = re.compile(rb'"(created|seconds|forward_seconds|host)": ?("[^"]*"|[\d.e+-]+)')


@dataclass(frozen=True)
class Finished:
    """A run that ended by itself."""

    code: int
    document: dict
    errors: str
    seconds: float


def command(*args: str) -> list[str]:
    """Return the command line of a batch."""
    return [sys.executable, "-m", "quantmix.cli.main", "batch", *args]


def batch(folder: Path, *args: str) -> Finished:
    """Run the pipeline of a folder to its end."""
    started = time.perf_counter()
    done = subprocess.run(
        command(str(folder / "pipeline.toml"), "--json", *args),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
        timeout=600,
    )
    document = json.loads(done.stdout) if done.stdout else {}
    return Finished(done.returncode, document, done.stderr, time.perf_counter() - started)


def write_models(folder: Path) -> Path:
    """Write the tiny model, its imatrix and a text into `folder`/models."""
    from quantmix.engine.imatrix import collect
    from quantmix.texts import text

    models = folder / "models"
    models.mkdir(parents=True)
    write_tiny(models / "tiny.gguf")
    (models / "text.txt").write_text(text("probe").read_text()[2000:4600])
    collect(models / "tiny.gguf", models / "text.txt", models / "tiny.dat", threads=1)
    return models


def new_folder(folder: Path, text: str, models: Path | None = None) -> Path:
    """Return a folder with a pipeline, and links to models."""
    folder.mkdir(parents=True)
    (folder / "pipeline.toml").write_text(text)
    if models is not None:
        (folder / "models").symlink_to(models)
    return folder


def kill_after(folder: Path, seconds: float, *args: str) -> bool:
    """Start a batch in a process group of its own and kill -9 the group; whether it still ran."""
    child = subprocess.Popen(
        command(str(folder / "pipeline.toml"), "--quiet", *args),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        child.wait(seconds)
        alive = False
    except subprocess.TimeoutExpired:
        alive = True
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return alive


def tree(out: Path) -> dict[str, str]:
    """Return file → digest of everything visible below `out`, times taken out."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        if name.parts[0] == ".quantmix" or not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".html"):
            data = _TIMES.sub(rb"time", data)
        found[str(name)] = hashlib.sha256(data).hexdigest()
    return found


def partial(out: Path) -> list[str]:
    """Return what is visible below `out` and not complete."""
    import gguf

    wrong = []
    for folder in out.glob("[!.]*"):
        names = {p.name for p in folder.iterdir()}
        missing = {"recipe.json", "rules.txt", "rules.args", "README.md", "types.png"} - names
        wrong += [f"{folder.name} lacks {name}" for name in missing]
        for path in folder.iterdir():
            if path.suffix == ".json":
                try:
                    json.loads(path.read_bytes())
                except ValueError:
                    wrong.append(f"{path} is no JSON")
            elif path.suffix == ".gguf":
                try:
                    gguf.GGUFReader(path)
                except Exception as err:
                    wrong.append(f"{path} is no GGUF: {err}")
            elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
                wrong.append(f"{path} is no whole PNG")
            elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
                wrong.append(f"{path} is no whole page")
            elif path.stat().st_size == 0:
                wrong.append(f"{path} is empty")
    return wrong


def finished(out: Path) -> Counter[tuple[str, str, str]]:
    """Return how often each (recipe, step, key) was finished."""
    with sqlite3.connect(out / ".quantmix" / "batch.db") as db:
        rows = db.execute("SELECT recipe, step, key FROM event WHERE what = 'finished'")
        return Counter(rows.fetchall())


def started_again(out: Path) -> list[tuple[str, str, str]]:
    """Return steps that were started with the same key after they had been finished."""
    with sqlite3.connect(out / ".quantmix" / "batch.db") as db:
        rows = db.execute("SELECT recipe, step, key, what FROM event ORDER BY id").fetchall()
    done: set[tuple[str, str, str]] = set()
    again = []
    for recipe, step, key, what in rows:
        if what == "finished":
            done.add((recipe, step, key))
        elif what == "started" and (recipe, step, key) in done:
            again.append((recipe, step, key))
    return again


def statuses(document: dict) -> Counter[str]:
    """Return how many steps ended how."""
    return Counter(s["status"] for row in document["items"] for s in row["steps"])
