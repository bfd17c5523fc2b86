"""`quantmix refine` with the real engine on a tiny model: files, resuming, crashes, errors."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from tiny import write_tiny

from quantmix import measure
from quantmix.budget import Budget
from quantmix.cli import refine as cli
from quantmix.design import design
from quantmix.engine import child, ghost
from quantmix.engine.imatrix import collect
from quantmix.engine.perplexity import evaluate
from quantmix.engine.quantize import preflight, quantize
from quantmix.errors import EngineError
from quantmix.ggml.weights import open_weights
from quantmix.models.sources import load_model
from quantmix.options import Options
from quantmix.palette import TypeLimits
from quantmix.recipe import load
from quantmix.refine import request, results, worker
from quantmix.refine.search import Place, Settings
from quantmix.texts import text

from .tiny_mla import write_mla

pytestmark = pytest.mark.engine

TYPES = ("q8_0", "q6_K", "q5_K", "q4_K", "q3_K", "q2_K")
SMALL = Settings(chunks=2, held_out=6, rounds=1, by="band", bands=2)


class Bench:
    """A tiny model, its imatrix, a text and a recipe from the prior."""

    def __init__(self, root: Path) -> None:
        self.source = write_tiny(root / "tiny.gguf")
        self.corpus, self.imatrix = root / "text.txt", root / "i.dat"
        self.corpus.write_text(text("probe").read_text()[3000:8000])
        collect(self.source, self.corpus, self.imatrix, chunks=2, threads=1)
        self.recipe = root / "recipes" / "tiny"
        options = Options(limits=TypeLimits(types=TYPES), name="tiny")
        model = load_model(str(self.source))
        design(model, Budget.from_size("4.0bpw"), options=options).save(self.recipe, figures=False)
        self.out = root / "done"
        self.answer = request.refine(request.prepare(self.job(), out=self.out))

    def job(self, **more: Any) -> worker.Job:
        """A job by bands on two chunks, six held out."""
        values: dict[str, Any] = {
            "recipe": self.recipe,
            "source": self.source,
            "corpus": self.corpus,
            "imatrix": self.imatrix,
            "measurements": None,
            "types": (),
            "settings": SMALL,
            "threads": 1,
        }
        return worker.Job(**{**values, **more})

    def call(self, *arguments: object) -> Any:
        """Run the command."""
        app = typer.Typer()
        cli.register(app)
        return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Made once, with one refined recipe."""
    return Bench(tmp_path_factory.mktemp("refine"))


def test_the_refined_recipe_is_better_checked_and_no_larger(bench: Bench) -> None:
    """On a random model the prior is wrong enough: less KLD at no more bytes, and `check` holds."""
    answer = bench.answer
    assert answer.recipe is not None
    before, after = load(bench.recipe), load(bench.out / "tiny-refined")
    assert answer.found.accepted
    assert after.quality.basis == "measured"
    assert after.size.tensor_bytes <= before.size.tensor_bytes
    assert ghost.check(after).ok
    assert after.check is not None
    assert after.refined is not None
    assert after.refined["kld"] < after.refined["kld_before"]
    assert after.quality.damage == pytest.approx(after.refined["kld"])
    assert after.refined["swaps"] == len(answer.to_json()["swaps"]) > 0
    assert {t.type for t in after.tensors} <= {*TYPES, "f32"}
    assert "held-out" in (bench.out / "tiny-refined" / "README.md").read_text()
    assert "refined" not in before.to_json()


def test_the_measured_kld_is_that_of_the_quantized_file(bench: Bench, tmp_path: Path) -> None:
    """The KLD in the recipe is what the file shows on the same chunks."""
    recipe = load(bench.out / "tiny-refined")
    made = quantize(
        preflight(recipe, bench.source, tmp_path / "q.gguf", imatrix=bench.imatrix), threads=1
    )
    seen = evaluate(made.path, bench.corpus, base=bench.source, chunks=8, threads=1).per_token
    assert seen.kld is not None
    assert recipe.refined is not None
    assert seen.kld.reshape(8, -1)[2:].mean() == pytest.approx(recipe.refined["kld"], rel=1e-4)


def test_nothing_is_measured_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same line again asks the engine for nothing, and comes to the same recipe."""
    before = (bench.out / "tiny-refined" / "rules.args").read_text()
    monkeypatch.setattr(worker, "_scorer", None)
    prepared = request.prepare(bench.job(), out=bench.out)
    asked: list[dict[str, Any]] = []
    again = request.refine(prepared, asked.append)
    assert not asked
    assert again.found.accepted
    assert (bench.out / "tiny-refined" / "rules.args").read_text() == before


def test_beside_the_recipe_is_so_from_within_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe named `.` or recipe.json has the same folder around it as by its path."""
    (bench.recipe / "notes").mkdir()
    there = request.prepare(bench.job()).out.resolve()
    assert there == bench.recipe.parent / "tiny-refined"
    monkeypatch.chdir(bench.recipe / "notes")
    assert request.prepare(bench.job(recipe=Path(".."))).out.resolve() == there
    monkeypatch.chdir(bench.recipe)
    (bench.recipe / "notes").rmdir()
    for name in (".", "recipe.json"):
        assert request.prepare(bench.job(recipe=Path(name))).out.resolve() == there


def test_a_crash_costs_the_mix_that_caused_it(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child dies in its third mix; the others are measured by the next child, once each."""
    real, calls = child.run, []

    def dying(task: str, asked: dict[str, Any], on_event: Any = None) -> dict[str, Any]:
        calls.append(len(asked["scores"]))
        if len(calls) > 1:
            return real(task, asked, on_event)

        def watch(event: dict[str, Any]) -> None:
            on_event(event)
            if "starts" in event and len(json.loads(out.read_text())["scores"]) == 2:
                raise EngineError("died of SIGABRT")

        out.write_text(json.dumps(results.Results({}).to_json()))
        return real(task, asked, watch)

    out = tmp_path / "p.json"
    monkeypatch.setattr(child, "run", dying)
    prepared = request.prepare(bench.job(), out=tmp_path, file=tmp_path / "none.json")
    worker.run(bench.job(), prepared.known, out)
    assert calls == [0, 2]
    assert list(prepared.known.failed.values()) == ["died of SIGABRT"]
    kept = results.load(out, prepared.known.conditions)
    assert kept.scores.keys() == prepared.known.scores.keys()
    answer = worker.replay(bench.job(), prepared.frame, kept)
    assert answer is not None
    told = request.refine(replace(prepared, known=kept)).notes
    assert any("1 mixes, the first by 'died of SIGABRT'" in note for note in told)
    assert len(answer.rounds[0].probes) == len(bench.answer.found.rounds[0].probes) - 1


def test_what_the_graph_never_reads_keeps_its_type(bench: Bench, tmp_path: Path) -> None:
    """ik reads an attn_kv_b made at load: attn_k_b and attn_v_b would seem to cost nothing."""
    source = write_mla(tmp_path / "mla.gguf")
    options = Options(limits=TypeLimits(types=TYPES), name="mla")
    model = load_model(str(source))
    design(model, Budget.from_size("5bpw"), options=options).save(tmp_path / "mla", figures=False)
    job = bench.job(recipe=tmp_path / "mla", source=source, imatrix=None)
    answer = request.refine(request.prepare(job))
    assert answer.found.accepted
    probed = {r["role"] for r in answer.to_json()["rounds"][0]["probes"]}
    assert "attn_q_b" in probed
    assert not {"attn_k_b", "attn_v_b"} & probed
    before, after = (
        {t.name: t.type for t in load(tmp_path / n).tensors} for n in ("mla", "mla-refined")
    )
    for name in (f"blk.{i}.attn_{x}_b.weight" for i in (0, 1) for x in "kv"):
        assert after[name] == before[name]
    assert answer.recipe is not None
    assert any("attn_k_b, attn_v_b as in" in w for w in answer.recipe.quality.warnings)
    assert any("attn_k_b, attn_v_b as in" in note for note in answer.notes)
    again = request.prepare(job)
    assert again.frame.held
    assert again.mixes < request.prepare(job, file=tmp_path / "new.json").mixes


def test_a_failure_on_held_out_chunks_is_no_verdict(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best mix could not be judged: exit 4 that says why and how to try again."""
    prepared = request.prepare(bench.job(), out=bench.out)
    best = results.mix_key(prepared.frame.mix(bench.answer.found.choice))
    doc = prepared.known.to_json()
    del doc["scores"][f"{best}@2+6"]
    doc["failed"] = {best: "died of SIGKILL"}
    broken = replace(prepared, known=results.from_json(doc, ""), file=tmp_path / "p.json")
    monkeypatch.setattr(worker, "_scorer", None)
    with pytest.raises(EngineError, match=r"judge .*: died of SIGKILL .*`failed` in .*p\.json"):
        request.refine(broken)
    doc["failed"] = {results.mix_key(prepared.frame.mix(prepared.frame.start)): "no room"}
    doc["scores"] = {}
    with pytest.raises(EngineError, match=r"cannot have tiny: no room .*`failed` in .*p\.json"):
        request.refine(replace(broken, known=results.from_json(doc, "")))


def test_a_recipe_that_stays_is_said_and_nothing_written(bench: Bench, tmp_path: Path) -> None:
    """With one type only there is nothing to swap: exit 0, one document, no folder."""
    options = Options(limits=TypeLimits(types=("q4_K",)), name="one")
    model = load_model(str(bench.source))
    design(model, Budget.from_size("5bpw"), options=options).save(tmp_path / "one", figures=False)
    done = bench.call(
        tmp_path / "one", bench.source, "--imatrix", bench.imatrix, "--corpus", bench.corpus,
        "--chunks", 2, "--held-out", 6, "--threads", 1, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["accepted"] is False
    assert document["held_out"] is None
    assert document["recipe"] == str(tmp_path / "one")
    assert "one stays" in document["verdict"]
    assert "one stays" in done.stderr
    assert not (tmp_path / "one-refined").exists()


def test_wrong_inputs_name_the_mend(bench: Bench, tmp_path: Path) -> None:
    """One line on stderr, its exit code, and no file."""
    common = ["--corpus", bench.corpus, "--threads", 1, "--out", tmp_path, "--quiet"]
    whole = ["--imatrix", bench.imatrix, *common]
    other = write_tiny(tmp_path / "other.gguf", experts=4)
    quantized = tmp_path / "q.gguf"
    quantize(preflight(load(bench.recipe), bench.source, quantized, imatrix=bench.imatrix))
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"schema": 1, "kind": "quantmix-refinement", "conditions": {}, "scores":'
                       ' {}, "failed": {}}')  # fmt: skip
    short = tmp_path / "short.json"
    doc = json.loads((bench.out / "tiny-refined.probes.json").read_text())
    next(iter(doc["scores"].values()))["kld"].pop()
    short.write_text(json.dumps(doc))
    doc = json.loads((bench.recipe / "recipe.json").read_text())
    doc["tensors"][0]["type"] = "q9_Z"
    (tmp_path / "unknown.json").write_text(json.dumps(doc))
    del doc["tensors"][0]["type"]
    (tmp_path / "lacking.json").write_text(json.dumps(doc))
    (tmp_path / "taken").write_text("")
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "none", bench.source, *whole], "no recipe at"),
        ([bench.recipe, tmp_path / "none.gguf", *whole], "none.gguf"),
        ([bench.recipe, other, *whole], "is not the model of this recipe"),
        ([bench.recipe, quantized, *whole], "is already quantized"),
        ([bench.recipe, bench.source, *whole, "--by", "layer"], "one of role, band, tensor"),
        ([bench.recipe, bench.source, *whole, "--types", "q9_K"], "q9_K"),
        ([bench.recipe, bench.source, *whole, "--types", "q8_0"], "not among its options"),
        ([bench.recipe, bench.source, *whole, "--name", "a/b"], "--name"),
        ([bench.recipe, bench.source, *whole, "--held-out", 90], "fewer --chunks and --held-out"),
        ([bench.recipe, bench.source, *whole, "--probes", foreign], "give another --probes"),
        ([bench.recipe, bench.source, *whole, "--probes", bench.source], "cannot be read"),
        ([bench.recipe, bench.source, *whole, "--probes", short], "9 numbers in kld, not 10"),
        (
            [bench.recipe, bench.source, *common, "--types", "q4_K,iq2_xxs"],
            "iq2_xxs needs an imatrix: give the --imatrix",
        ),
        ([tmp_path / "unknown.json", bench.source, *whole], "unknown type for ik 'q9_Z'"),
        ([tmp_path / "lacking.json", bench.source, *whole], "lacking.json is not a quantmix"),
        ([bench.recipe, bench.source, *whole, "--name", "taken"], "taken exists and is no recipe"),
        ([bench.recipe, bench.source, "--imatrix", bench.corpus, *common], "imatrix"),
        (
            [bench.recipe, bench.source, *whole, "--name", "tiny", "--out", bench.recipe.parent],
            "is the recipe itself",
        ),
    ]
    there = set(tmp_path.iterdir())
    for arguments, message in cases:
        done = bench.call(*arguments)
        assert done.exit_code == 2, (arguments, done.output, done.exception)
        assert message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert set(tmp_path.iterdir()) == there


def test_scores_belong_to_a_mix_and_a_place() -> None:
    """The order of tensors does not matter; another type or place is another score."""
    here = Place(0, 2)
    one = results.key({"a": "q4_K", "b": "q8_0"}, here)
    assert one == results.key({"b": "q8_0", "a": "q4_K"}, here)
    assert one != results.key({"a": "q4_K", "b": "q6_K"}, here)
    assert one != results.key({"a": "q4_K", "b": "q8_0"}, Place(2, 2))


def test_what_measure_has_seen_is_not_held_out(bench: Bench, tmp_path: Path) -> None:
    """Chunks that the loss model was measured on judge nothing; those of another text may."""
    file = tmp_path / "m.json"
    groups = measure.groups_of(open_weights(bench.source), "role", ["q4_K"], roles=["ffn_down"])
    run = measure.Run(bench.source, bench.corpus, bench.imatrix, groups, {}, chunks=5, threads=1)
    measure.measure(run, file)
    job = bench.job(measurements=file)
    assert request.prepare(job, out=tmp_path).job.settings.judged == Place(5, 6)
    other = tmp_path / "other.txt"
    other.write_text(bench.corpus.read_text()[9:])
    prepared = request.prepare(replace(job, corpus=other), out=tmp_path)
    assert prepared.job.settings.judged == Place(2, 6)
