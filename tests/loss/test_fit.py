"""Refitting the shipped parameters."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantmix.errors import BadFile
from quantmix.loss import calibrate, evidence, mixes, prior
from quantmix.loss import curve as shipped
from quantmix.loss.fit import curate, curve, hyper, sensitivity, tables
from quantmix.loss.fit.__main__ import refit

from .conftest import catalog_model

RESEARCH = os.environ.get("QUANTMIX_RESEARCH")
DATA = Path(shipped.__file__).parent
FILES = (
    "curve.csv",
    "no_imatrix.csv",
    "sensitivity.csv",
    "published.csv",
    "base_ppl.csv",
    "params.json",
)


@pytest.mark.slow
@pytest.mark.skipif(not RESEARCH, reason="QUANTMIX_RESEARCH does not point at the raw tables")
def test_refitting_reproduces_the_shipped_files(tmp_path: Path) -> None:
    """The same tables give the same bytes."""
    root = Path(RESEARCH or "") / "data"
    refit(root / "thireus", root / "ppl_measurements.csv", tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def _sweeps(power: float = 1.0, ln_c: float = -0.5) -> list[tables.Sweep]:
    """Sweeps of five models that obey the model exactly, with the shipped gains."""
    out = []
    for i, (scale, floor) in enumerate(
        [(0.04, 1e-3), (0.02, 1e-3), (0.012, 5e-3), (0.01, 6e-4), (0.006, 5e-4)]
    ):
        kld = {}
        for name, g in shipped.measured().items():
            x = scale * g.gain
            kld[name] = floor + x * (1.0 + (math.exp(ln_c) * x) ** power)
        out.append(tables.Sweep(f"model-{i}", kld))
    return out


def test_a_curve_that_made_the_data_is_found_again() -> None:
    """Gains, super-additivity, scales and floors come back within a few percent."""
    sums = (0.4, 0.9, 1.3, 2.0)
    anchors = [(s, s * (1.0 + math.exp(-0.5) * s)) for s in sums]
    fit = curve.fit_curve(_sweeps(), anchors)
    assert fit.rms < 0.02
    assert fit.power == pytest.approx(1.0, abs=0.1)
    for name in ("q6_K", "iq3_k", "iq2_kt", "iq1_m"):
        assert math.exp(fit.ln_gain[name]) == pytest.approx(shipped.measured()[name].gain, rel=0.08)
    assert fit.scale["model-0"] == pytest.approx(0.04, rel=0.08)


def test_one_broken_cell_changes_nothing() -> None:
    """A sweep with one absurd value gives the same curve."""
    sweeps = _sweeps()
    clean = curve.fit_curve(sweeps, [(1.0, 1.6)])
    sweeps[1].kld["iq3_k"] *= 9.0
    dirty = curve.fit_curve(sweeps, [(1.0, 1.6)])
    assert dirty.ln_gain["iq3_k"] == pytest.approx(clean.ln_gain["iq3_k"], abs=0.03)
    assert dirty.n_models["iq3_k"] == clean.n_models["iq3_k"] - 1


def _write_tables(root: Path) -> None:
    """A table of Qwen3.5-0.8B with known shares: ffn_down twice ffn_up, a floor, a group."""
    from quantmix.models.sources import load_model

    model = load_model("qwen3.5-0.8b")
    names = [t.name for t in model.tensors if t.quantizable]
    cells = []
    for t in model.tensors:
        if t.quantizable:
            value = {"ffn_down": 0.02, "ffn_up": 0.01}.get(t.role, 0.0)
            # attn_k and attn_v of a layer were measured together: both hold the sum.
            value = 0.03 if t.role in ("attn_k", "attn_v") else value
            noise = 1e-7 * (t.layer or 0)
            cells.append(f"{0.004 + value + noise:.7f}")
    folder = root / "models" / "Qwen3.5-0.8B"
    folder.mkdir(parents=True)
    (folder / "kld_results.csv").write_text(
        "QTYPE," + ",".join(names) + "\niq1_bn," + ",".join(["404"] * len(names))
        + "\niq1_kt," + ",".join(cells) + "\n"
    )  # fmt: skip


def test_floor_and_groups_are_taken_out(tmp_path: Path) -> None:
    """The noise floor is subtracted, a grouped value is split, shares keep their ratio."""
    _write_tables(tmp_path)
    found = tables.kld_tables(tmp_path)
    assert [t.type for t in found] == ["iq1_kt"]
    fit = sensitivity.fit_sensitivity(found)
    share = {r: s for (f, r), s in fit.share.items() if f == "hybrid"}
    assert share["ffn_down"] / share["ffn_up"] == pytest.approx(2.0, rel=0.02)
    assert share["attn_k"] / share["ffn_up"] == pytest.approx(1.5, rel=0.02)
    assert share["ssm_out"] < 0.02 * share["ffn_up"]


def test_tables_of_perplexity_give_its_logarithm(tmp_path: Path) -> None:
    """Cells of ppl tables are ln PPL; 404 and rows of ternary types are not read."""
    folder = tmp_path / "models" / "Qwen3.5-0.8B"
    folder.mkdir(parents=True)
    (folder / "ppl_results.csv").write_text("QTYPE,a,b\niq1_bn,9,9\niq1_kt,7.5,404\n")
    (found,) = tables.ppl_tables(tmp_path)
    assert (found.model, found.type) == ("Qwen3.5-0.8B", "iq1_kt")
    assert found.cells == {"a": pytest.approx(math.log(7.5)), "b": None}


def test_a_table_without_attention_is_put_on_the_scale_of_whole_ones() -> None:
    """Half a model's cells do not count as a whole model; ratios inside the table stay."""
    r1 = catalog_model("deepseek-r1")
    value = {"ffn_down_exps": 4e-3, "ffn_up_exps": 2e-3, "ffn_gate_exps": 2e-3}
    cells = {
        t.name: 1e-7 * (t.layer or 0) + value.get(t.role, 1e-3)
        for t in r1.tensors
        if t.quantizable and t.loaded
    }
    part = {n: v for n, v in cells.items() if "attn" not in n}
    whole = tables.TensorTable("DeepSeek-R1", "iq1_kt", dict(cells))
    half = tables.TensorTable("DeepSeek-V3", "iq1_kt", dict(part))
    alone = sensitivity.fit_sensitivity([whole]).share
    both = sensitivity.fit_sensitivity([whole, half]).share
    for role in value:
        assert both["mla", role] == pytest.approx(alone["mla", role], rel=0.02), role


def test_published_mixes_belong_to_rows_and_their_size_agrees() -> None:
    """A mix added to a row fits the size its author published, and says where it stands."""
    rows = {(p.model, p.label): p for p in evidence.published()}
    text = (DATA / "fit" / "mixes.csv").read_text(encoding="utf-8")
    added = list(csv.DictReader(text.splitlines()))
    assert len(added) == len(curate.pages())
    for line in added:
        row = rows[evidence.catalog_id(line["model"]) or "", line["label"]]
        assert line["source"].startswith("https://")
        assert row.mix == line["mix"]
        model = catalog_model(row.model)
        bits = evidence.bits_of(model, mixes.resolve(model, row.mix))
        assert bits == pytest.approx(row.bpw, rel=0.007), line["label"]


def test_files_whose_matrix_lacked_attention_count_as_made_without() -> None:
    """Their author says so of the first Kimi-K2 files; they neither calibrate nor are judged."""
    rows = [p for p in evidence.published() if p.model == "kimi-k2-instruct"]
    first = [p for p in rows if "v0.1" in p.label]
    assert len(first) == 6
    assert not any(p.imatrix for p in first)
    model = catalog_model("kimi-k2-instruct")
    used = {r.id for r in evidence.bench(model, prior.shares(model), rows).rows}
    assert not used & {p.label for p in first}
    assert {"IQ4_KS (ubergarm)", "IQ1_KT (ubergarm)", "UD-IQ3_XXS (unsloth)"} <= used


def test_a_type_on_few_models_keeps_its_far_cells() -> None:
    """Nothing tells a broken cell from a wide spread on fewer than five models."""
    sweeps = _sweeps()
    # q8_KV at one scale a row: 0.3 to 1.2 of iq4_k, as on real models.
    for sweep, factor in zip(sweeps[:4], (0.3, 0.5, 0.8, 1.2), strict=True):
        floor = sweep.kld["q8_0"]
        sweep.kld["q8_KV"] = floor + factor * (sweep.kld["iq4_k"] - floor)
    del sweeps[4].kld["q8_KV"]
    fitted = curve.fit_curve(sweeps, [])
    assert fitted.n_models["q8_KV"] == 4
    assert 0.4 < math.exp(fitted.ln_gain["q8_KV"]) < 0.9
    assert fitted.sd["q8_KV"] > 0.3


def test_a_model_with_many_rows_does_not_set_the_interval_alone() -> None:
    """A quantile covers its share of the weight, not of the rows; never less than normal."""
    known = {"ln_ppl": 1.0, "damage": 0.1, "rise": 0.1, "relative": 0.1, "edge": 1e-3, "known": 1.0}
    sure = calibrate.Prediction(**known)
    near = [hyper._Left(sure, 1.0, 1.0 / 50) for _ in range(50)]
    far = [hyper._Left(sure, 1.03, 1.0)]
    h = calibrate.hyper()

    def of_rise(q: float) -> calibrate.Hyper:
        return replace(h, quantiles=(q, 1.645))

    assert hyper._least(near, of_rise).quantiles[0] == 1.65
    both = hyper._least(near + far, of_rise).quantiles[0]
    assert both == pytest.approx(math.log(1.3) / 0.1, abs=0.06)


def test_the_quantile_goes_from_the_priors_to_that_of_calibrated_models() -> None:
    """By what rows took off the uncertainty of the scale; never so that more rows widen."""
    h = replace(calibrate.hyper(), quantiles=(2.4, 1.645), quantile_prior=1.65)
    reach = []
    for known in (0.0, 0.3, 0.6, 0.9):
        p = calibrate.Prediction(1.0, 0.1, 0.1, 0.5 * (1.0 - known), 1e-9, known)
        reach.append(p.interval(h)[1] - 1.0)
    assert reach == sorted(reach, reverse=True)
    assert reach[0] == pytest.approx(0.1 * math.expm1(1.65 * 0.5), rel=1e-3)


def test_shapes_over_depth_are_shrunk_towards_flat() -> None:
    """Noise gives no shape; a strong rise gives a rise, but less than the data's."""
    u = np.linspace(-1.0, 1.0, 40)
    flat = sensitivity.fit_shape([(u, 1.0 + 0.1 * np.sin(37.0 * u))])
    assert abs(flat.slope) < 0.1
    steep = sensitivity.fit_shape([(u, np.exp(u) / np.exp(u).mean())])
    assert 0.5 < steep.slope < 1.0


def test_tables_need_a_folder(tmp_path: Path) -> None:
    """A missing folder is named."""
    with pytest.raises(BadFile, match="no model folders"):
        tables.ppl_tables(tmp_path / "none")


@pytest.mark.parametrize("module", ["quantmix.loss.fit", "quantmix.loss.fit.by_size"])
def test_the_commands_end_with_one_line(module: str, tmp_path: Path) -> None:
    """A missing table is one line on stderr and exit code 2."""
    arguments = ["--measurements", str(tmp_path / "none.csv")]
    if module == "quantmix.loss.fit":
        arguments += ["--tables", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "none.csv cannot be read" in done.stderr


def test_curation_keeps_one_bench_and_current_code() -> None:
    """Calibration text, superseded code and other models' weights stay out."""
    row = dict.fromkeys(curate.COLUMNS, "")
    row |= {"model": "DeepSeek-R1", "label": "Q4", "ppl": "3.4", "corpus": "wiki.test.raw",
            "n_ctx": "512", "base_ppl_bf16_or_q8": "3.349"}  # fmt: skip
    rows = [
        row,
        {**row, "corpus": "calibration.txt"},
        {**row, "n_ctx": "2048"},
        {**row, "label": "Q4 (before)"},
        {**row, "model": "Somebody-7B"},
    ]
    kept = curate.curate(rows)
    assert [(r["model"], r["label"]) for r in kept] == [("deepseek-r1", "Q4")]
    assert curate.base_rows(kept)[0]["ppl"] == "3.349"


def test_a_mix_published_on_another_page_is_added_only_where_there_is_none() -> None:
    """The author's own mix column is never overwritten."""
    row = dict.fromkeys(curate.COLUMNS, "")
    row |= {"model": "DeepSeek-V3.1", "label": "IQ4_K (ubergarm)", "ppl": "3.3715",
            "corpus": "wiki.test.raw", "n_ctx": "512"}  # fmt: skip
    bare, named = curate.curate([row, {**row, "mix": "all=q8_0"}])
    assert "ffn_down_exps=iq5_k" in bare["mix"]
    assert named["mix"] == "all=q8_0"
