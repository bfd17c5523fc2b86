"""Per-tensor tables of other tools become measurements."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from quantmix import measurements
from quantmix.errors import BadFile, UsageError
from quantmix.ggml.types import get
from quantmix.loss import load
from quantmix.loss.curve import gain_of
from quantmix.loss.measured import MeasuredModel
from quantmix.loss.model import LossModel
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.table_import import import_table

MODEL = load_model("qwen3-4b-instruct-2507")
TYPES = ("iq1_s", "iq2_k", "iq4_k", "q8_0")


def table(tmp_path: Path, *lines: str) -> Path:
    """Write a table."""
    path = tmp_path / "kld_results.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_floor_is_taken_off_and_roles_are_sums(tmp_path: Path) -> None:
    """The least cell of a row is noise, taken off once; a missing cell scales its role up."""
    path = table(
        tmp_path,
        "QTYPE,blk.0.attn_k.weight,blk.1.attn_k.weight,blk.0.ffn_down.weight,other",
        "iq1_kt,0.002,404,0.012,7",
    )
    found = import_table(path, MODEL)
    tensors = {p.role: p.kld for p in found.probes if p.scope == "tensor"}
    roles = {p.role: p.kld for p in found.probes if p.scope == "role"}
    assert tensors == {"attn_k": 0.0, "ffn_down": pytest.approx(0.010)}
    assert roles["ffn_down"] == pytest.approx(0.010 * MODEL.hparams.n_layer)
    assert found.noise_floor == 0.0


def imported(tmp_path: Path, model: Model, **rows: float) -> LossModel:
    """Return the loss model of a saved table in which attn_k costs a twentieth of other roles."""
    names = [t.name for t in model.tensors if t.quantizable and t.layer is not None]
    lines = [
        f"{qtype}," + ",".join(str(kld / 20 if "attn_k" in n else kld) for n in names)
        for qtype, kld in rows.items()
    ]
    out = tmp_path / "m.json"
    path = table(tmp_path, "QTYPE," + ",".join(names), *lines)
    measurements.save(import_table(path, model), out)
    return load(model, measurements=out)


def test_an_imported_table_feeds_a_design(tmp_path: Path) -> None:
    """Saved and loaded, the table makes a measured loss model that follows its cells."""
    loss = imported(tmp_path, MODEL, iq2_k=0.02)
    assert loss.basis == "measured"
    damage = loss.damage(MODEL, [get("iq2_k")])[:, 0]
    by_role = {t.role: d for t, d in zip(MODEL.tensors, damage, strict=True) if t.quantizable}
    assert by_role["ffn_down"] > 5 * by_role["attn_k"]


def test_types_of_an_imported_table_cost_by_the_type_curve(tmp_path: Path) -> None:
    """A table says no quantization errors: what it lacks is placed by the curve, not alike."""
    one = imported(tmp_path, MODEL, iq2_k=0.002)
    at = dict(zip(TYPES, one.damage(MODEL, [get(n) for n in TYPES]).sum(axis=0), strict=True))
    assert at["iq1_s"] > 3 * at["iq2_k"]
    assert at["iq2_k"] / at["iq4_k"] == pytest.approx(gain_of("iq2_k").gain, rel=0.25)
    assert at["q8_0"] < at["iq4_k"] / 5
    two = imported(tmp_path, MODEL, iq2_k=0.002, iq4_k=0.0002)
    low, between, high = two.damage(MODEL, [get(n) for n in ("iq4_k", "iq3_k", "iq2_k")]).sum(0)
    assert low < between < high
    assert 8 < high / low < gain_of("iq2_k").gain


def test_an_imported_table_predicts_a_ratio_and_no_perplexity(tmp_path: Path) -> None:
    """The perplexity of the table's base is not known, and nothing is made up for it."""
    loss = imported(tmp_path, MODEL, iq2_k=0.002)
    quality = loss.quality(MODEL, [get("iq4_k") if t.quantizable else None for t in MODEL.tensors])
    assert quality.ppl is None
    assert quality.ppl_base is None
    assert not any("importance matrix" in w for w in quality.warnings)
    assert quality.ln_ppl_ratio_low is not None
    assert 0.0 < quality.ln_ppl_ratio_low < quality.ln_ppl_ratio < 0.1


def test_the_level_of_a_table_is_less_sure_than_own_probes(tmp_path: Path) -> None:
    """Sums over single tensors are off by half in either direction, whole roles are not."""
    table_model = imported(tmp_path, MODEL, iq2_k=0.002)
    assert isinstance(table_model, MeasuredModel)
    own = replace(table_model, summed=False)
    mix = [get("iq2_k") if t.quantizable else None for t in MODEL.tensors]
    wide, narrow = table_model.quality(MODEL, mix), own.quality(MODEL, mix)
    assert wide.ln_ppl_ratio == narrow.ln_ppl_ratio
    assert wide.ln_ppl_ratio_high > 1.2 * narrow.ln_ppl_ratio_high  # type: ignore[operator]
    assert wide.ln_ppl_ratio_low < narrow.ln_ppl_ratio_low / 1.2  # type: ignore[operator]


def test_an_imported_table_serves_a_local_file(tmp_path: Path) -> None:
    """A table has no fingerprint: a GGUF of the same name and sizes takes it."""
    ghost = tmp_path / "ghost.gguf"
    write_ghost(ghost, MODEL)
    assert imported(tmp_path, load_model(str(ghost)), iq2_k=0.02).basis == "measured"


def test_a_cell_of_404_was_not_measured_however_it_is_written(tmp_path: Path) -> None:
    """404.000000 is no KLD of 404 nats."""
    columns = "QTYPE,blk.0.attn_k.weight,blk.1.attn_k.weight,blk.0.ffn_down.weight"
    path = table(tmp_path, columns, "iq1_kt,404.000000, 4.04e2 ,0.002")
    assert {p.role for p in import_table(path, MODEL).probes} == {"ffn_down"}


def test_ternary_rows_rank_nothing(tmp_path: Path) -> None:
    """Rows of iq1_bn and its like are left out of the probes."""
    columns = "QTYPE,blk.0.attn_k.weight,blk.0.ffn_down.weight"
    path = table(tmp_path, columns, "iq1_bn,0.1,0.9", "iq1_kt,0.001,0.002")
    assert {p.type for p in import_table(path, MODEL).probes} == {"iq1_kt"}


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        (("a,b", "1,2"), BadFile, "QTYPE"),
        (("QTYPE,nothing", "iq1_kt,0.1"), UsageError, "no tensor"),
        (("QTYPE,blk.0.attn_k.weight", "iq1_kt,high"), BadFile, "high"),
        (("QTYPE,blk.0.attn_k.weight", "iq1_kt,404"), BadFile, "no measured"),
    ],
)
def test_wrong_tables_are_answered(
    tmp_path: Path, lines: tuple[str, ...], error: type[Exception], words: str
) -> None:
    """What is no such table is named."""
    with pytest.raises(error, match=words):
        import_table(table(tmp_path, *lines), MODEL)


@pytest.mark.skipif("QUANTMIX_RESEARCH" not in os.environ, reason="raw tables are not here")
def test_a_published_table_is_read() -> None:
    """A real table of seven types, two of them ternary, gives probes of five."""
    folder = Path(os.environ["QUANTMIX_RESEARCH"]) / "data/thireus/models/Qwen3-4B-Instruct-2507"
    found = import_table(folder / "kld_results.csv", MODEL)
    assert len({p.type for p in found.probes}) == 5
