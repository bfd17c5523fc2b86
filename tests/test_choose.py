"""Which of several files is taken, against `offload` and `predict` on each of them alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from quantmix import predict
from quantmix.budget import Budget
from quantmix.choose import Choice, choose, require_one
from quantmix.cli import choose as command
from quantmix.design import design
from quantmix.errors import BadFile, InfeasibleBudget, UsageError
from quantmix.ggml import types
from quantmix.loss import evidence
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model, Tensor
from quantmix.models.sources import load_model
from quantmix.offers import Offer, offers
from quantmix.offload import place, stored
from quantmix.units import GIB

MODEL = "qwen3-30b-a3b"


def write(path: Path, model: Model, kind: str) -> Path:
    """Write a file without data whose matrices are of one type."""
    path.parent.mkdir(exist_ok=True)

    def type_of(t: Tensor) -> str:
        return types.resolve(kind, t.name, t.shape).name if t.quantizable else t.source_type

    write_ghost(path, model, type_of)
    return path


@pytest.fixture(scope="module")
def quants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as publishers fill it: files, one folder per quant, side files, a broken file."""
    folder = tmp_path_factory.mktemp("quants")
    model = load_model(MODEL)
    write(folder / "q30-q8_0.gguf", model, "q8_0")
    write(folder / "q30-q4_K.gguf", model, "q4_K")
    write(folder / "IQ2" / "q30.gguf", model, "iq2_k")
    write(folder / "IQ3" / "q30.gguf", model, "iq3_k")
    write(folder / "mmproj-q30.gguf", load_model("llama-3.1-8b"), "q8_0")
    (folder / "broken.gguf").write_bytes(b"GGUF")
    return folder


def by_name(choice: Choice) -> dict[str, object]:
    """File names with whether they fit."""
    return {j.offer.name: j.plan is not None for j in choice.files}


def test_the_best_that_fits_is_taken(quants: Path) -> None:
    """Every file is placed as `offload` and predicted as `predict` would alone."""
    found = offers([str(quants)])
    assert [name for name, _ in found.left_out] == ["broken"]
    budget = Budget.from_gpus("1xrtx-4090", ctx=16384)
    choice = choose(found, budget)
    fits = {"IQ2/q30": True, "IQ3/q30": True, "q30-q4_K": True, "q30-q8_0": False}
    assert by_name(choice) == fits
    assert choice.pick is not None
    assert choice.pick.offer.name == "q30-q4_K"
    assert [j.offer.name for j in choice.files] == ["q30-q4_K", "IQ3/q30", "IQ2/q30", "q30-q8_0"]
    assert budget.rig is not None
    for judged in choice.files:
        file = stored(judged.offer.model, "ik")
        assert judged.size is not None
        assert judged.size.tensor_bytes == file.tensor_bytes
        if judged.plan is None:
            with pytest.raises(InfeasibleBudget):
                place(file, budget.rig, budget.settings)
            continue
        alone = place(file, budget.rig, budget.settings)
        assert judged.plan == alone
        assert all((d.free_bytes or 0) >= 0 for d in judged.plan.devices)
        base = load_model(MODEL)
        mix = {t.name: t.source_type for t in judged.offer.model.tensors if t.quantizable}
        assert judged.quality == predict.predict(base, mix, foreign=True).quality
    assert choice.design is not None
    assert choice.pick.quality is not None
    assert choice.design.quality.ln_ppl_ratio <= choice.pick.quality.ln_ppl_ratio


def test_a_speed_to_reach_rules_files_out(quants: Path) -> None:
    """The pick reaches it; what fits but is slower stays in the list and says so."""
    found = offers([str(quants)])
    budget = Budget.from_gpus("1xrtx-4090", ctx=16384)
    speeds = {j.offer.name: j.tps for j in choose(found, budget, design=False).files if j.plan}
    fastest = speeds["IQ2/q30"]
    assert fastest is not None
    choice = choose(found, budget, min_tps=fastest - 0.1, design=False)
    assert choice.pick is not None
    assert choice.pick.offer.name == "IQ2/q30"
    assert {j.offer.name for j in choice.files if j.why == "too slow"} == {"IQ3/q30", "q30-q4_K"}
    with pytest.raises(UsageError, match="name the cards"):
        choose(found, Budget.from_gpus("24G", ctx=16384), min_tps=5.0, design=False)


def test_where_nothing_can_be_taken_the_least_is_named(quants: Path) -> None:
    """With what a design would do there, if one is possible."""
    found = offers([str(quants / "q30-q8_0.gguf"), str(quants / "IQ3")])
    budget = Budget.from_gpus("1x10G", ctx=4096)
    choice = choose(found, budget)
    with pytest.raises(InfeasibleBudget, match=r"none of the 2 .* q30: short .* a mix of .* GiB"):
        require_one(choice)


def test_where_all_are_too_slow_the_speed_that_works_is_named(quants: Path) -> None:
    """It is that of the fastest file, and works when it is asked for."""
    found = offers([str(quants)])
    budget = Budget.from_gpus("1xrtx-4090", ctx=16384)
    with pytest.raises(InfeasibleBudget, match=r"fastest, IQ2/q30: too slow; lower") as refused:
        require_one(choose(found, budget, min_tps=5000.0))
    told = float(str(refused.value).rpartition(" ")[2])
    assert require_one(choose(found, budget, min_tps=told)).offer.name == "IQ2/q30"


def test_files_of_different_models_are_no_choice(quants: Path, tmp_path: Path) -> None:
    """PPL of one is nothing to PPL of another; strays in a folder are left out."""
    other = write(tmp_path / "q32.gguf", load_model("qwen3-32b"), "q4_K")
    with pytest.raises(UsageError, match="files of one model"):
        offers([str(quants / "q30-q4_K.gguf"), str(other)])
    write(tmp_path / "a-q30.gguf", load_model(MODEL), "q4_K")
    write(tmp_path / "b-q30.gguf", load_model(MODEL), "q8_0")
    found = offers([str(tmp_path)])
    assert [o.name for o in found.files] == ["a-q30", "b-q30"]
    assert found.left_out == (("q32", "it is another model, qwen3-32b"),)
    assert [o.name for o in offers([str(other), str(quants)]).files] == ["q32"]


def test_published_mixes_of_the_catalog() -> None:
    """Their measured perplexities rank them, and their sizes are those that were published."""
    found = offers(["deepseek-r1-0528"])
    choice = choose(found, Budget.from_gpus("4x96G", ctx=8192), design=False)
    taken = [j for j in choice.files if not j.why]
    assert choice.pick is not None
    assert choice.pick.ppl == min(j.ppl for j in taken if j.ppl)
    assert choice.pick.offer.fetch == []
    for judged in choice.files:
        row = judged.offer.published
        assert row is not None
        assert judged.ppl == row.ppl
        assert judged.size is not None
        if row.bpw:
            assert judged.size.bpw == pytest.approx(row.bpw, rel=0.006), row.label
    left = {name for name, _ in found.left_out}
    rows = evidence.of_model(found.model)
    assert left == {r.label for r in rows if not r.mix}
    reasons = {why for _, why in offers(["deepseek-r1"]).left_out}
    assert reasons == {"its types are not published", "not enough of its types is published"}


def test_stock_presets_stand_beside_what_was_published() -> None:
    """They are the engine's own mixes; a model that nobody published has them alone."""
    found = offers(["qwen3-32b"], stock=("Q4_K_M", "Q8_0"))
    assert [o.name for o in found.files] == ["Q4_K_M (stock)", "Q8_0 (stock)"]
    choice = choose(found, Budget.from_gpus("1xrtx-4090", ctx=16384), design=False)
    assert choice.pick is not None
    assert choice.pick.offer.name == "Q4_K_M (stock)"
    assert choice.pick.offer.file == "MODEL"
    assert choice.pick.size is not None
    base = load_model("qwen3-32b")
    mix = predict.uniform(base, "Q4_K_M")
    assert choice.pick.size == predict.predict(base, mix).size
    both = offers(["deepseek-r1-0528"], stock=("IQ1_M",))
    assert both.files[-1].published is None
    assert all(o.published for o in both.files[:-1])
    for bare in ("qwen3-32b", "llama-2-70b"):  # of the latter sizes are published
        with pytest.raises(BadFile, match="--presets"):
            offers([bare])


@pytest.mark.parametrize("name", ["glm-4.5-air", "glm-4.6"])
def test_blocks_that_are_not_run_have_the_types_of_the_last_layer(name: str) -> None:
    """Nobody tells those of GLM's multi-token block; the sizes that were published have it."""
    for offer in offers([name]).files:
        row, n_bytes = offer.published, stored(offer.model, "ik").tensor_bytes
        assert len(offer.model.tensors) == len(load_model(name).tensors)
        assert row is not None
        if row.bpw:
            bits = 8 * n_bytes / offer.model.n_elements
            assert bits == pytest.approx(row.bpw, rel=0.02), row.label
        if row.size_gib:
            assert n_bytes / GIB == pytest.approx(row.size_gib, rel=0.02), row.label


def test_presets_and_the_design_are_of_the_whole_model() -> None:
    """What GLM's multi-token block takes is part of a stock file, and of what would be made."""
    model = load_model("glm-4.5-air")
    found = offers(["glm-4.5-air"], stock=("Q4_K_M",))
    assert found.files[-1].model.id == model.id
    assert [t.name for t in found.files[-1].model.tensors] == [t.name for t in model.tensors]
    budget = Budget.from_gpus("1xrtx-3090", ram="128G", ctx=8192)
    choice = choose(found, budget)
    stock = next(j for j in choice.files if j.offer.name == "Q4_K_M (stock)")
    assert stock.size == predict.predict(model, predict.uniform(model, "Q4_K_M")).size
    assert choice.design is not None
    assert choice.design.size == design(model, budget).size


def test_presets_that_an_engine_cannot_make_are_left_out() -> None:
    """The packaged ik is older than gemma-4, and a failed assertion in it is no answer."""
    with pytest.raises(BadFile, match=r"Q4_K_M \(stock\): the ik engine here does not .* gemma4"):
        offers(["gemma-4-31b-it"], stock=("Q4_K_M",))
    found = offers(["gemma-4-31b-it"], stock=("Q4_K_M",), engine="mainline")
    assert [o.name for o in found.files] == ["Q4_K_M (stock)"]


def test_types_that_the_engine_lacks_are_told(quants: Path) -> None:
    """ik's types cannot be run by mainline."""
    budget = Budget.from_gpus("1xrtx-4090", ctx=16384, engine="mainline")
    choice = choose(offers([str(quants)]), budget, design=False)
    why = {j.offer.name: j.why for j in choice.files}
    assert why["IQ2/q30"] == "iq2_k is a type of ik only"
    assert choice.pick is not None
    assert choice.pick.offer.name == "q30-q4_K"


def run(*args: str) -> Result:
    """Run the command."""
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return CliRunner().invoke(app, ["choose", *args])


def test_the_command_prints_a_line_to_copy(quants: Path) -> None:
    """The launch line of the pick on stdout, all else on stderr; or one JSON document."""
    result = run(str(quants), "--gpus", "1xrtx-4090", "--no-design")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.strip().splitlines()
    assert f"llama-server -m {quants / 'q30-q4_K.gguf'} -ngl 999" in line
    assert "q30-q8_0" in result.stderr
    result = run(str(quants), "--gpus", "1xrtx-4090", "--ctx", "max", "--json")
    doc = json.loads(result.stdout)
    assert doc["pick"] == "q30-q4_K"
    assert doc["files"][0]["ctx"] % 256 == 0
    assert doc["left_out"][0]["name"] == "broken"


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("nonsense", "--gpus", "24G"), 2, "nonsense"),
        (("deepseek-r1-0528",), 2, "--gpus"),
        (("deepseek-r1-0528", "--gpus", "24G", "--ctx", "many"), 2, "many"),
        (("deepseek-r1-0528", "--gpus", "24G", "--no-design"), 3, "short by"),
        (("deepseek-r1-0528", "--gpus", "rtx-4090", "--min-tps", "0"), 2, "--min-tps 0"),
        (("deepseek-r1-0528", "--gpus", "rtx-4090", "--min-tps", "nan"), 2, "--min-tps nan"),
        (("gpt-oss-20b", "smollm2-135m", "--gpus", "24G"), 2, ""),
        (("./absent.gguf", "--gpus", "24G"), 2, "absent.gguf"),
        (("hf:one", "--gpus", "24G"), 2, "hf:org/name"),
    ],
)
def test_wrong_input_gets_one_line(args: tuple[str, ...], code: int, told: str) -> None:
    """It names the thing, with the exit code of its kind."""
    result = run(*args)
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("quantmix: ")
    assert told in last
    assert "Traceback" not in result.output


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    """Nor does one that holds other things only, a projector among them."""
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "mmproj-f16.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadFile, match="holds no GGUF"):
        offers([str(tmp_path)])


def test_a_file_of_a_url_is_called_as_it_is_saved() -> None:
    """What is asked of the server is no part of its name."""
    url = "https://host/org/a%20b-00001-of-00002.gguf?download=true"
    assert Offer("q", url, load_model(MODEL)).file == "a b-00001-of-00002.gguf"
