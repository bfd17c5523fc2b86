"""Naming outputs: complete, replaceable, and the same after a kill at any point."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from quantmix.batch import identity
from quantmix.batch.executor import LocalExecutor
from quantmix.batch.items import Item
from quantmix.batch.pipeline import load
from quantmix.batch.publish import STAGE, publish, recover, require_free_name
from quantmix.batch.run import open_batch, run
from quantmix.batch.state import Intent, State
from quantmix.engine.quantize import compare
from quantmix.errors import UsageError
from quantmix.ggml.types import get
from quantmix.ggml.weights import open_weights
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata, write_sparse
from quantmix.recipe import load as load_recipe
from quantmix.verify import find_target


def staged(out: Path, text: str) -> Intent:
    """Put a folder and a file into the stage and return their intent."""
    stage = out / STAGE / "r.design.1"
    (stage / "r").mkdir(parents=True)
    (stage / "r" / "a").write_text(text)
    (stage / "extra").write_text(text + "!")
    moves = ((f"{STAGE}/r.design.1/r", "r"), (f"{STAGE}/r.design.1/extra", "r/extra"))
    outputs = {
        "r/a": identity.of_file(stage / "r" / "a"),
        "r/extra": identity.of_file(stage / "extra"),
    }
    return Intent("r", "design", text, 1.0, {}, outputs, moves)


def names(folder: Path) -> dict[str, str]:
    """Return file → content."""
    return {p.name: p.read_text() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("moved", [0, 1, 2])
@pytest.mark.parametrize("older", [False, True])
def test_a_kill_between_moves_changes_nothing(tmp_path: Path, moved: int, older: bool) -> None:
    """However many moves were made before the kill, recovery ends the same."""
    with State(tmp_path) as state:
        if older:
            publish(state, staged(tmp_path, "old"))
        intent = staged(tmp_path, "new")
        state.intend(intent)
    if older and moved:
        shutil.rmtree(tmp_path / "r")
    for source, target in intent.moves[:moved]:
        (tmp_path / source).rename(tmp_path / target)
    with State(tmp_path) as state:
        assert [i.key for i in recover(state)] == ["new"]
        last = state.step("r", "design")
        assert last is not None
        assert last.status == "done"
    assert names(tmp_path / "r") == {"a": "new", "extra": "new!"}
    assert not (tmp_path / STAGE).exists()


def test_a_replaced_folder_leaves_nothing(tmp_path: Path) -> None:
    """Files of the old folder are gone unless they were carried over."""
    with State(tmp_path) as state:
        publish(state, staged(tmp_path, "old"))
        (tmp_path / "r" / "stale").write_text("x")
        publish(state, staged(tmp_path, "new"))
    assert names(tmp_path / "r") == {"a": "new", "extra": "new!"}


def test_what_was_not_finished_is_cleaned_away(tmp_path: Path) -> None:
    """A stage without intent is removed, named outputs are not."""
    with State(tmp_path) as state:
        publish(state, staged(tmp_path, "one"))
        staged(tmp_path, "half")
        assert recover(state) == []
    assert names(tmp_path / "r") == {"a": "one", "extra": "one!"}
    assert not (tmp_path / STAGE).exists()


def test_an_intent_without_outputs_is_forgotten(tmp_path: Path) -> None:
    """When someone removed the stage, the step is not finished after all."""
    with State(tmp_path) as state:
        state.intend(staged(tmp_path, "one"))
        shutil.rmtree(tmp_path / STAGE)
        assert recover(state) == []
        assert state.intents() == []
        assert state.step("r", "design") is None


def test_an_output_that_cannot_be_moved_fails_its_step_alone(tmp_path: Path) -> None:
    """Its intent is given up with the reason and can run again; others are finished."""
    blocked = staged(tmp_path, "one")
    (tmp_path / "r").write_text("of someone else")
    stage = tmp_path / STAGE / "s.design.1"
    stage.mkdir()
    (stage / "f").write_text("f")
    digest = identity.of_file(stage / "f")
    moves = ((f"{STAGE}/s.design.1/f", "s/f"),)
    with State(tmp_path) as state:
        state.intend(blocked)
        state.intend(Intent("s", "design", "k", 1.0, {}, {"s/f": digest}, moves))
        assert [i.recipe for i in recover(state)] == ["s"]
        assert state.intents() == []
        last = state.step("r", "design")
        assert last is not None
        assert (last.status, last.lasting, last.code) == ("failed", False, 2)
        assert "cannot write" in last.reason
    assert (tmp_path / "r").read_text() == "of someone else"
    assert (tmp_path / "s" / "f").read_text() == "f"
    assert not (tmp_path / STAGE).exists()


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the new folder cannot be moved to its name, the old one is there as it was."""
    with State(tmp_path) as state:
        publish(state, staged(tmp_path, "old"))
        intent = staged(tmp_path, "new")
        rename = os.rename

        def failing(source: Path, target: Path) -> None:
            if STAGE in str(source):
                raise OSError(5, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(UsageError, match="Input/output error"):
            publish(state, intent)
    assert names(tmp_path / "r") == {"a": "old", "extra": "old!"}


class Blocking:
    """A watcher that puts a file in the place of the first recipe while it is designed."""

    def __init__(self, out: Path, blocked: str = "") -> None:
        self.out = out
        self.blocked = blocked

    def started(self, item: Item, step: str) -> None:
        """Block the first."""
        if not self.blocked:
            self.blocked = item.name
            (self.out / item.name).write_text("of someone else")

    def progress(self, item: Item, step: str, event: object) -> None:
        """Do nothing."""

    def ended(self, item: Item, step: str, seconds: float, reason: str) -> None:
        """Do nothing."""


def test_a_run_goes_on_when_an_output_cannot_be_moved(tmp_path: Path) -> None:
    """The item fails with the reason, the next is made, and a later run mends the first."""
    text = """
        [[job]]
        model = "qwen3-0.6b"
        budgets = ["--size 4.5bpw", "--size 3.5bpw"]
        steps = ["design"]
        """
    (tmp_path / "p.toml").write_text(text)
    pipeline = load(tmp_path / "p.toml")

    def go() -> list[str]:
        with open_batch(pipeline) as batch:
            ended = run(
                *(batch, lambda: LocalExecutor(tmp_path, 1), watcher),
                keep="all",
                disk_bytes=None,
            )
        return [e.failure.reason if e.failure else e.steps[0].what for e in ended]

    watcher = Blocking(tmp_path / "recipes")
    first, second = go()
    assert watcher.blocked in first
    assert second == "ran"
    (tmp_path / "recipes" / watcher.blocked).unlink()
    assert go() == ["ran", "done"]


def test_a_design_made_again_keeps_what_others_put_there(tmp_path: Path) -> None:
    """Files and folders of others stay; a GGUF that batch did not make is set aside."""
    text = '[[job]]\nmodel = "qwen3-0.6b"\nbudgets = ["--size {} --name mine"]\nsteps = ["design"]'
    place = tmp_path / "recipes" / "mine"

    def go(size: str) -> tuple[str, list[str]]:
        (tmp_path / "p.toml").write_text(text.format(size))
        with open_batch(load(tmp_path / "p.toml")) as batch:
            (ended,) = run(
                *(batch, lambda: LocalExecutor(tmp_path, 1), Blocking(tmp_path, "nobody")),
                keep="all",
                disk_bytes=None,
            )
        return ended.steps[0].what, ended.results["design"]["notes"]

    go("4.5bpw")
    before = load_recipe(place)
    planned = [NewTensor(t.name, t.shape, get(t.type)) for t in before.tensors]
    kv = encode_metadata({"general.architecture": "qwen3"})
    write_sparse(place / "mine.gguf", *encode_header(kv, planned))
    (place / "own").mkdir()
    (place / "own" / "notes.txt").write_text("mine")
    (place / "imatrix.dat").write_text("mine too")
    what, notes = go("3.5bpw")
    assert what == "ran"
    assert any("earlier-1" in note and "mine.gguf" in note for note in notes)
    assert load_recipe(place).size != before.size
    assert (place / "own" / "notes.txt").read_text() == "mine"
    assert (place / "imatrix.dat").read_text() == "mine too"
    assert not (place / "mine.gguf").exists()
    kept = find_target(place / "earlier-1")
    assert kept.recipe is not None
    assert kept.recipe.to_json() == before.to_json()
    compare(kept.recipe, open_weights(kept.file))
    assert go("3.5bpw")[0] == "done"
    go("4bpw")
    assert (place / "earlier-1" / "mine.gguf").exists()


def test_folders_of_others_are_not_replaced(tmp_path: Path) -> None:
    """A folder that is no recipe, or a file, is refused."""
    (tmp_path / "a").mkdir()
    require_free_name(tmp_path / "a")
    (tmp_path / "a" / "thesis.tex").write_text("x")
    (tmp_path / "b").write_text("x")
    for name in ("a", "b"):
        with pytest.raises(UsageError):
            require_free_name(tmp_path / name)
