"""`quantmix batch` as people run it: from an empty folder, again, changed, failing, stopped."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .runs import (
    CATALOG,
    REAL,
    batch,
    command,
    finished,
    kill_after,
    new_folder,
    partial,
    started_again,
    statuses,
    tree,
)


def replace_budget(place: Path, old: str, new: str) -> None:
    """Change one budget of a pipeline."""
    path = place / "pipeline.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _children_seconds() -> float:
    """Processor time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A pipeline with all steps, run once with one worker."""
    place = new_folder(tmp_path_factory.mktemp("real") / "p", REAL, models)
    first = batch(place)
    assert first.code == 0, first.errors
    assert statuses(first.document) == {"ran": 12}
    return place


@pytest.mark.slow
@pytest.mark.engine
def test_a_second_run_does_nothing_in_three_seconds(real: Path) -> None:
    """Nothing is started, nothing is touched; of processor time, since machines are shared."""
    files = [p for p in (real / "recipes").rglob("*") if ".quantmix" not in p.parts]
    before = {p: p.stat().st_mtime_ns for p in files}
    spent = _children_seconds()
    again = batch(real)
    assert statuses(again.document) == {"done": 12}
    assert _children_seconds() - spent <= 3.0
    assert {p: p.stat().st_mtime_ns for p in files} == before


@pytest.mark.slow
@pytest.mark.engine
def test_the_summary_has_the_figures(real: Path) -> None:
    """Sizes, predicted and measured quality are in the JSON and equal the files."""
    row = batch(real).document["items"][1]
    place = real / "recipes" / "tiny-6.5bpw"
    recipe = json.loads((place / "recipe.json").read_text())
    measured = json.loads((place / "verify.json").read_text())
    assert row["tensor_bytes"] == recipe["size"]["tensor_bytes"]
    assert row["checked_by"] == recipe["check"]["engine"] == "llama-quantize dry-run"
    assert (row["ppl"], row["kld"]) == (measured["ppl"], measured["kld"]["mean"])
    assert row["file_bytes"] == (place / "tiny-6.5bpw.gguf").stat().st_size


@pytest.mark.slow
@pytest.mark.engine
def test_two_workers_and_kills_end_the_same(real: Path, tmp_path: Path, models: Path) -> None:
    """kill -9 of the group at five moments of one batch: the same bytes, no step twice."""
    place = new_folder(tmp_path / "p", REAL, models)
    out = place / "recipes"
    moments = random.Random(os.environ.get("QUANTMIX_SEED", "7"))
    for _ in range(5):
        kill_after(place, moments.uniform(0.6, 4.0), "--jobs", "2")
        assert not out.exists() or partial(out) == []
    last = batch(place, "--jobs", "2")
    assert last.code == 0, last.errors
    assert tree(out) == tree(real / "recipes")
    assert started_again(out) == []
    assert set(finished(out).values()) == {1}
    assert not (out / ".quantmix" / "stage").exists()


@pytest.mark.slow
def test_a_failing_job_stops_only_itself(tmp_path: Path) -> None:
    """Others run, the reason is told, the exit code is the failure's, a rerun tries no more."""
    place = new_folder(tmp_path / "p", CATALOG)
    replace_budget(place, '"--vram 2G"', '"--vram 2M", "--vram 2G"')
    first = batch(place)
    assert first.code == 3
    bad = first.document["items"][0]
    assert [s["status"] for s in bad["steps"]] == ["failed", "blocked"]
    assert bad["reason"].startswith("design: qwen3-0.6b does not fit 2M")
    assert Path(bad["steps"][0]["log"]).read_text()
    assert statuses(first.document) == {"failed": 1, "blocked": 1, "ran": 6}
    again = batch(place)
    assert again.code == 3
    assert statuses(again.document) == {"failed": 1, "blocked": 1, "done": 6}
    assert again.document["items"][0]["reason"] == bad["reason"]

    replace_budget(place, "--vram 2M", "--vram 1800M --ctx 512")
    mended = batch(place)
    assert mended.code == 0, mended.errors
    assert statuses(mended.document) == {"ran": 2, "done": 6}


@pytest.mark.slow
def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    """--dry-run says what would run and why, with estimates, and leaves no trace."""
    place = new_folder(tmp_path / "p", CATALOG)
    plan = batch(place, "--dry-run")
    assert plan.code == 0
    assert plan.document["counts"] == {"done": 0, "run": 3, "later": 3, "failed": 0, "blocked": 0}
    assert plan.document["seconds"] > 0
    assert plan.document["items"][0]["steps"][0]["reason"] == "never ran"
    assert not (place / "recipes").exists()


def test_a_plan_says_why_a_step_would_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source that is missing is told by --dry-run, before anything runs."""
    from quantmix.cli.batch import batch as run_batch

    text = '[[job]]\nmodel = "absent.gguf"\nbudgets = ["--size 4bpw"]\n'
    (tmp_path / "pipeline.toml").write_text(text)
    run_batch(tmp_path / "pipeline.toml", dry_run=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "1 would fail" in said
    assert "design: " in said
    assert "absent.gguf is not a file" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_is_exit_130_and_resumable(tmp_path: Path, number: int) -> None:
    """Ctrl-C, or a job scheduler's TERM: no worker stays, what was finished is kept."""
    place = new_folder(tmp_path / "p", CATALOG)
    child = subprocess.Popen(
        command(str(place / "pipeline.toml"), "--jobs", "2"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it puts in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("[1/"):
            break
    child.send_signal(number)
    rest = child.stderr.read()
    assert child.wait(30) == 130
    assert "interrupted" in rest
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    done = sum(finished(place / "recipes").values())
    assert done >= 1
    if number == signal.SIGTERM:
        return
    last = batch(place)
    assert last.code == 0
    assert statuses(last.document)["done"] == done
    assert started_again(place / "recipes") == []


@pytest.mark.slow
def test_workers_die_with_the_batch(tmp_path: Path) -> None:
    """Killing only the batch itself leaves no worker behind."""
    place = new_folder(tmp_path / "p", CATALOG)
    child = subprocess.Popen(
        command(str(place / "pipeline.toml"), "--quiet"), start_new_session=True
    )
    stage = place / "recipes" / ".quantmix" / "stage"
    until = time.monotonic() + 20
    while not stage.exists() and time.monotonic() < until:
        time.sleep(0.02)
    child.kill()
    child.wait()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a worker outlived the batch")


def copy_of(real: Path, place: Path) -> Path:
    """Return a copy of a folder that was run, state and all."""
    return Path(shutil.copytree(real, place, symlinks=True))


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(("keep", "kept"), [("last", [False, True]), ("best", [False, True])])
def test_keep(real: Path, tmp_path: Path, keep: str, kept: list[bool]) -> None:
    """Big files that are not kept go once their steps are done; a rerun does not miss them."""
    place = copy_of(real, tmp_path / "p")
    for _ in range(2):
        done = batch(place, "--keep", keep)
        assert statuses(done.document) == {"done": 12}, done.errors
        mine = done.document["items"][1:]
        assert [row["file_kept"] for row in mine] == kept
        there = [(place / row["recipe"]).glob("*.gguf") for row in mine]
        assert [any(files) for files in there] == kept


@pytest.mark.slow
@pytest.mark.engine
def test_the_disk_budget_is_honoured(real: Path, tmp_path: Path) -> None:
    """A file beyond the budget is not made, and the reason names the budget; last makes room."""
    place = copy_of(real, tmp_path / "p")
    replace_budget(place, "--size 8bpw", "--size 7bpw")
    shutil.rmtree(place / "recipes" / "tiny-8bpw")
    short = batch(place, "--disk", "1500K")
    failed = [row for row in short.document["items"] if not row["ok"]]
    assert [Path(row["recipe"]).name for row in failed] == ["tiny-7bpw"]
    assert failed[0]["reason"].startswith("quantize: the file takes")
    assert "disk budget" in failed[0]["reason"]
    assert short.code == 2
    room = batch(place, "--disk", "1500K", "--keep", "last")
    assert room.code == 0, room.errors
    assert [p.name for p in (place / "recipes").rglob("*.gguf")] == ["tiny-7bpw.gguf"]


@pytest.mark.slow
@pytest.mark.engine
def test_an_edited_design_is_made_again_and_the_file_is_kept(real: Path, tmp_path: Path) -> None:
    """A design that comes out the same reruns nothing behind it."""
    place = copy_of(real, tmp_path / "p")
    out = place / "recipes"
    before = (out / "tiny-8bpw" / "tiny-8bpw.gguf").stat()
    (out / "tiny-8bpw" / "rules.txt").write_text("edited")
    again = batch(place).document["items"]
    ran = [(r["recipe"], s["step"]) for r in again for s in r["steps"] if s["status"] == "ran"]
    assert ran == [("recipes/tiny-8bpw", "design")]
    assert (out / "tiny-8bpw" / "tiny-8bpw.gguf").stat().st_ino == before.st_ino
    assert tree(out) == tree(real / "recipes")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """A bad pipeline is exit 2 and one line, before anything runs."""
    place = new_folder(tmp_path / "p", '[[job]]\nmodel = "qwen3-0.6b"\nbudgets = ["--vrm 2G"]\n')
    done = batch(place)
    assert done.code == 2
    assert done.errors.count("\n") == 1
    assert "job 1 (qwen3-0.6b): budgets: number 1: unknown flag '--vrm'" in done.errors
    assert not (place / "recipes").exists()


@pytest.mark.slow
@pytest.mark.engine
def test_a_recipe_is_the_one_that_design_writes(real: Path, tmp_path: Path) -> None:
    """Batch and the command write the same folder, byte for byte but for the date."""
    flags = ["--vram", "2G", "--ctx", "4096", "--quiet", "--out", str(tmp_path)]
    design = [*command()[:-1], "design", "qwen3-0.6b", *flags]
    assert subprocess.run(design, check=False).returncode == 0
    batched = {k: v for k, v in tree(real / "recipes").items() if k.startswith("qwen3")}
    assert len(batched) >= 8
    assert tree(tmp_path) == batched
