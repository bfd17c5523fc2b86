"""Per-tensor tables of other tools become measurements."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantmix import measurements
from quantmix.errors import BadFile, UsageError
from quantmix.loss import load
from quantmix.models.sources import load_model
from quantmix.table_import import import_table

MODEL = load_model("qwen3-4b-instruct-2507")


def table(tmp_path: Path, *lines: str) -> Path:
    """Write a table."""
    path = tmp_path / "kld_results.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_floor_is_taken_off_and_roles_are_sums(tmp_path: Path) -> None:
    """The least cell of a row is noise; a missing cell scales its role up."""
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
    assert found.noise_floor == 0.002


def test_an_imported_table_feeds_a_design(tmp_path: Path) -> None:
    """Saved and loaded, the table makes a measured loss model that follows its cells."""
    names = [t.name for t in MODEL.tensors if t.quantizable and t.layer is not None]
    cells = ["0.001" if "attn_k" in n else "0.02" for n in names]
    path = table(tmp_path, "QTYPE," + ",".join(names), "iq2_k," + ",".join(cells))
    out = tmp_path / "m.json"
    measurements.save(import_table(path, MODEL), out)
    loss = load(MODEL, measurements=out)
    assert loss.basis == "measured"
    from quantmix.ggml.types import get

    damage = loss.damage(MODEL, [get("iq2_k")])[:, 0]
    by_role = {t.role: d for t, d in zip(MODEL.tensors, damage, strict=True) if t.quantizable}
    assert by_role["ffn_down"] > 5 * by_role["attn_k"]


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
    """A real table of seven types gives seven probes per tensor and per role."""
    folder = Path(os.environ["QUANTMIX_RESEARCH"]) / "data/thireus/models/Qwen3-4B-Instruct-2507"
    found = import_table(folder / "kld_results.csv", MODEL)
    assert len({p.type for p in found.probes}) >= 2
