"""Which steps must run: what changed, what is missing, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quantmix.batch import identity
from quantmix.batch.items import Inputs, Item, Judged, expand, judge, key_of
from quantmix.batch.pipeline import load
from quantmix.batch.state import Intent, State
from quantmix.errors import UsageError

JOB = '[[job]]\nmodel = "qwen3-0.6b"\n'
ALL = ("design", "check", "quantize", "verify", "report")
FULL = """
[[job]]
model = "m.gguf"
imatrix = "m.dat"
corpus = "t.txt"
budgets = ["--size 4bpw"]
steps = ["design", "check", "quantize", "verify", "report"]
"""


def names(folder: Path, text: str) -> list[str]:
    """Return the recipe names of a pipeline."""
    (folder / "p.toml").write_text(text)
    with State(folder / "recipes", readonly=True) as state:
        return [i.name for i in expand(load(folder / "p.toml"), state)]


def test_names_are_those_of_design(tmp_path: Path) -> None:
    """A plain budget names its recipe as the command does; --name wins."""
    text = JOB + 'budgets = ["--vram 2G", "--size 3.5bpw --name mine", "--max-loss 1%"]'
    assert names(tmp_path, text) == ["qwen3-0.6b-2G", "mine", "qwen3-0.6b-max-loss-1-"]


def test_an_inverse_question_within_a_budget_names_both(tmp_path: Path) -> None:
    """The same loss sought in two budgets makes two recipes."""
    text = JOB + 'budgets = ["--vram 4G --max-loss 1", "--size 8bpw --max-loss 1"]'
    assert names(tmp_path, text) == ["qwen3-0.6b-4G-max-loss-1", "qwen3-0.6b-8bpw-max-loss-1"]


def test_budgets_that_differ_elsewhere_are_told_apart(tmp_path: Path) -> None:
    """The same memory at two contexts makes two recipes."""
    found = names(tmp_path, JOB + 'budgets = ["--vram 2G", "--vram 2G --ctx 64k"]')
    assert found == ["qwen3-0.6b-vram-2G", "qwen3-0.6b-vram-2G-ctx-64k"]


def test_equal_names_are_refused(tmp_path: Path) -> None:
    """Two budgets of one name would overwrite each other: both are named."""
    with pytest.raises(UsageError, match=r"job 2 .*same recipe name .* job 1"):
        names(tmp_path, JOB + 'budgets = ["--vram 2G"]\n' + JOB + 'budgets = ["--vram 2G"]\n')


def test_an_unknown_model_fails_its_own_items_only(tmp_path: Path) -> None:
    """A model that cannot be read is a failed item with the reason; others are planned."""
    (tmp_path / "p.toml").write_text(
        '[[job]]\nmodel = "qwen9"\nbudgets = ["--vram 2G"]\n' + JOB + 'budgets = ["--vram 2G"]'
    )
    with State(tmp_path / "recipes", readonly=True) as state:
        bad, good = expand(load(tmp_path / "p.toml"), state)
        verdicts = [
            [j.verdict for j in judge(i, state, Inputs(state, tmp_path), state.out)]
            for i in (bad, good)
        ]
    assert "qwen9" in bad.problem
    assert verdicts == [["failed", "blocked"], ["run", "later"]]


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Path:
    """A folder with a pipeline of all steps and its inputs."""
    for name, wanted in (("tiny.gguf", "m.gguf"), ("tiny.dat", "m.dat"), ("text.txt", "t.txt")):
        (tmp_path / wanted).write_bytes((models / name).read_bytes())
    (tmp_path / "p.toml").write_text(FULL)
    return tmp_path


def opened(place: Path) -> tuple[State, Item, Inputs]:
    """Open the pipeline of `place`."""
    state = State(place / "recipes")
    (item,) = expand(load(place / "p.toml"), state)
    return state, item, Inputs(state, place)


def pretend(place: Path) -> None:
    """Record every step as done, each with one output."""
    state, item, inputs = opened(place)
    results = {"design": {"recipe": "R", "mix": "M", "file_bytes": 1}, "verify": {"ppl": 1.0}}
    with state:
        known: dict[str, dict[str, object]] = {}
        for step in ALL:
            key = key_of(item, step, known, inputs)
            known[step] = results.get(step, {})
            file = state.out / item.name / f"{step}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(known[step]))
            outputs = {f"{item.name}/{file.name}": identity.of_file(file)}
            state.done(Intent(item.name, step, key, 1.0, known[step], outputs, ()))


def verdicts(place: Path) -> list[str]:
    """Return the verdict of every step."""
    state, item, inputs = opened(place)
    with state:
        return [j.verdict for j in judge(item, state, inputs, state.out)]


def test_nothing_to_do(place: Path) -> None:
    """With inputs and outputs as they were, every step is done."""
    pretend(place)
    assert verdicts(place) == ["done"] * 5


@pytest.mark.parametrize(
    ("file", "first"), [("m.gguf", "design"), ("m.dat", "quantize"), ("t.txt", "verify")]
)
def test_a_changed_input_reruns_from_the_step_that_reads_it(
    place: Path, file: str, first: str
) -> None:
    """Steps before it stay done, steps after it wait for what it makes."""
    pretend(place)
    data = bytearray((place / file).read_bytes())
    data[-1] ^= 1
    (place / file).write_bytes(data)
    n = ALL.index(first)
    assert verdicts(place) == ["done"] * n + ["run"] + ["later"] * (4 - n)


def test_a_touched_input_reruns_nothing(place: Path) -> None:
    """Content counts, not the clock."""
    pretend(place)
    (place / "m.gguf").touch()
    assert verdicts(place) == ["done"] * 5


@pytest.mark.parametrize("step", ALL)
@pytest.mark.parametrize("how", ["removed", "changed"])
def test_a_lost_output_reruns_its_step(place: Path, step: str, how: str) -> None:
    """An output that is gone or was edited is made again."""
    pretend(place)
    (file,) = (place / "recipes").glob(f"*/{step}.txt")
    file.unlink() if how == "removed" else file.write_text("edited")
    assert verdicts(place)[ALL.index(step)] == "run"


def test_another_budget_is_another_recipe(place: Path) -> None:
    """A changed budget reruns all of its steps."""
    pretend(place)
    (place / "p.toml").write_text(FULL.replace("4bpw", "5bpw"))
    assert verdicts(place) == ["run", "later", "later", "later", "later"]


def test_lasting_failures_are_not_tried_again(place: Path) -> None:
    """What depends on the inputs alone stays failed until they change; the rest is retried."""
    for lasting, wanted in ((True, "failed"), (False, "run")):
        state, item, inputs = opened(place)
        with state:
            key = key_of(item, "design", {}, inputs)
            state.failed(item.name, "design", key, 0.1, "does not fit", 3, lasting)
            first: Judged = judge(item, state, inputs, state.out)[0]
        assert first.verdict == wanted
        assert "does not fit" in first.reason


def test_a_dropped_file_is_made_again_only_when_needed(place: Path) -> None:
    """Without its file the item is done, unless verify must run."""
    pretend(place)
    state, item, inputs = opened(place)
    with state:
        state.rewritten(item.name, "quantize", {})
        (state.out / item.name / "quantize.txt").unlink()
        assert [j.verdict for j in judge(item, state, inputs, state.out)] == ["done"] * 5
        other = replace(item, job=replace(item.job, chunks=7))
        found = [j.verdict for j in judge(other, state, inputs, state.out)]
    assert found == ["done", "done", "run", "later", "later"]


def test_shards_are_found_by_their_exact_names(tmp_path: Path) -> None:
    """Brackets in a name are no pattern, and a longer name is another model."""
    ours = [tmp_path / f"m[v2]-0000{i}-of-00002.gguf" for i in (1, 2)]
    for file in (*ours, tmp_path / "m[v2]-big-00001-of-00002.gguf"):
        file.write_text("x")
    assert identity.model_files(ours[1]) == ours
    ours[0].unlink()
    assert identity.model_files(ours[1]) == ours[1:]
