"""The backtest of speed says how good predictions are, and what it could not judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantmix.errors import BadFile
from quantmix.speed.backtest import run
from quantmix.speed.logs import label_type, log_model, parse_cards, read_logs


def test_the_document_has_the_keys_of_the_contract(logs: Path) -> None:
    """n, bands, controls, rows and skipped; every row has its band."""
    doc = run(logs)
    assert set(doc) == {"n", "bands", "controls", "rows", "skipped"}
    assert doc["n"] == len(doc["rows"]) == 4
    for row in doc["rows"]:
        assert row["low"] < row["predicted"] < row["high"]
        assert row["low"] < row["measured"] < row["high"]
    by_name = {b["band"]: b for b in doc["bands"]}
    assert by_name["hybrid"]["n"] == 2
    assert by_name["all"]["coverage90"] == 1.0


def test_nothing_is_dropped_silently(logs: Path) -> None:
    """Every row that is not judged is listed with a reason."""
    doc = run(logs)
    why = {s["id"].split("@")[0]: s["why"] for s in doc["skipped"]}
    assert "two sockets" in why["two"]
    assert "no bandwidth" in why["nobw"]
    assert "not known" in why["nomodel"]
    assert doc["n"] + len(doc["skipped"]) == 7


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    """A CSV of something else is a bad file, with the missing column named."""
    file = tmp_path / "x.csv"
    file.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(BadFile, match="case_id"):
        run(file)
    with pytest.raises(BadFile, match="cannot be read"):
        run(tmp_path / "none.csv")


def test_cards_and_types_are_read_from_what_people_write() -> None:
    """Counts, memory sizes, and decorated names of quants."""
    keys = [c.key for c in parse_cards("1x RTX 5090 32G; 2x RTX 3090 24G")]
    assert keys == ["rtx-5090", "rtx-3090", "rtx-3090"]
    names = [getattr(label_type(x), "name", None) for x in ("UD-Q2_K_XL", "mix-IQ3_K", "?")]
    assert names == ["q2_K", "iq3_k", None]
    known = log_model("DeepSeek-V3/R1 671B")
    assert known is not None
    assert (known.layers, known.moe_layers, known.kind) == (61, 58, "mla")
    assert log_model("minimax-m2") is not None


def test_layers_with_experts_in_ram_are_counted_by_the_rows_own_rules(
    logs: Path, tmp_path: Path
) -> None:
    """Ten layers that an override keeps on the GPU do not wait for the CPU."""
    text = logs.read_text(encoding="utf-8").replace(
        "1x RTX 5090 32G,exps=CPU", r"1x RTX 5090 32G,blk\.([3-9]|1[0-2])\.ffn=CUDA0;exps=CPU"
    )
    file = tmp_path / "edited.csv"
    file.write_text(text, encoding="utf-8")
    assert read_logs(logs)[0][0].load.cpu_expert_layers == 58
    assert read_logs(file)[0][0].load.cpu_expert_layers == 48


def test_published_logs_are_predicted_well_enough() -> None:
    """On the shipped logs: direction right in at least 80 % of pairs, median error below 10 %."""
    doc = run()
    everything = next(b for b in doc["bands"] if b["band"] == "all")
    assert doc["controls"]["pairs"]["share"] >= 0.8
    assert doc["controls"]["pairs"]["n"] > 100
    assert everything["median"] <= 0.10
    assert everything["coverage90"] >= 0.9
    assert doc["n"] + len(doc["skipped"]) == 409
