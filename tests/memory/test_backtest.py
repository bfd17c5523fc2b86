"""Predictions against the published logs that are shipped, and the reading of such tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from quantmix.errors import BadFile
from quantmix.memory import fit
from quantmix.memory.backtest import backtest, run
from quantmix.memory.evidence import compute_evidence
from quantmix.memory.logmodels import find_model
from quantmix.memory.logroles import expert_bytes, experts_in_ram, gpu_roles, layer_homes
from quantmix.memory.logs import REQUIRED, LogCase, parse_rows, read_logs
from quantmix.memory.margins import margins
from quantmix.units import MIB


@pytest.fixture(scope="module")
def cases() -> dict[str, LogCase]:
    """The shipped cases by id."""
    return {c.id: c for c in read_logs()}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The backtest on the shipped cases."""
    return run()


def band(document: dict[str, Any], name: str) -> dict[str, Any]:
    """One band by name."""
    found: dict[str, Any] = next(b for b in document["bands"] if b["band"] == name)
    return found


def test_kv_and_output_are_exact(document: dict[str, Any]) -> None:
    """KV within 0.1 % in at least 98 % of the cases, logits buffers in all."""
    assert band(document, "kv")["n"] >= 160
    assert band(document, "kv")["exact"] >= 0.98
    assert band(document, "output")["n"] >= 150
    assert band(document, "output")["exact"] == 1.0


def test_layer_splits_by_count_are_exact(document: dict[str, Any]) -> None:
    """Every card's cache says that `-ts` put the layers where we do."""
    assert band(document, "split")["n"] >= 100
    assert band(document, "split")["exact"] == 1.0


def test_compute_buffers(document: dict[str, Any]) -> None:
    """ik since 2025-03: median error at most 3 %, p95 at most 31 %."""
    found = band(document, "compute")
    assert found["n"] >= 130
    assert found["median"] <= 0.03
    assert found["p95"] <= 0.31


def test_what_fits_fits(document: dict[str, Any]) -> None:
    """Bounds lie above the real buffer in 96 % of rows, also on threads they were not fitted to,
    at a median price of 450 MiB and 1 % of the card at most."""
    found = band(document, "fits")
    assert found["coverage"] >= 0.96
    assert found["coverage_left_out"] >= 0.96
    assert found["median_slack_mib"] <= 450
    assert found["median_slack_share"] <= 0.01


def test_nothing_is_dropped_silently(document: dict[str, Any], cases: dict[str, LogCase]) -> None:
    """Every GPU buffer and every cache is either judged or named with a reason."""
    named = {r["id"] for r in document["rows"]} | {s["id"] for s in document["skipped"]}
    for case in cases.values():
        assert f"{case.id}/kv" in named
        for gpu in case.gpus:
            if gpu.compute is not None:
                assert f"{case.id}/{gpu.name}/compute" in named
    assert all(s["why"] for s in document["skipped"])
    assert document["n"] == len(document["rows"])


def test_shipped_margins_are_what_the_fit_gives() -> None:
    """margins.csv is the result of the command it names."""
    rows, _ = compute_evidence(read_logs())
    fitted = fit.fit_margins(rows)
    assert fitted.keys() == margins().keys()
    for name, margin in margins().items():
        assert margin.factor == pytest.approx(fitted[name].factor, abs=1e-4)
        assert margin.add_bytes == fitted[name].add_bytes


def test_refit_command(tmp_path: Path) -> None:
    """`python -m quantmix.memory.fit` writes the table that is shipped."""
    out = tmp_path / "margins.csv"
    assert fit.main(["--out", str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        assert {r["regime"] for r in csv.DictReader(file)} == set(margins())


def test_without_rows_margins_stay_wide() -> None:
    """A fit to nothing still gives a margin."""
    assert fit.fit_margins([])["*"].factor == 1.2


def test_roles_from_a_log(cases: dict[str, LogCase]) -> None:
    """L190: one card holds all layers, two hold only experts, the rest is in RAM and copied."""
    case = cases["L190"]
    roles = gpu_roles(case)
    assert [roles[n].layers for n in ("CUDA0", "CUDA1", "CUDA2")] == [True, False, False]
    assert [roles[n].experts for n in ("CUDA0", "CUDA1", "CUDA2")] == [False, True, True]
    assert roles["CUDA0"].output
    assert experts_in_ram(case)
    assert set(layer_homes(case).values()) == {"CUDA0"}


def test_expert_types_from_a_log(cases: dict[str, LogCase]) -> None:
    """L040 lists 116 iq4_k_r4 (gate and up) and 58 iq5_k_r4 (down) tensors."""
    found = expert_bytes(cases["L040"])
    assert found is not None
    assert found.gate_up == 2016 * MIB
    assert found.largest == 2464 * MIB
    assert found.has_cuda_kernel


def test_layers_left_in_ram(cases: dict[str, LogCase]) -> None:
    """L233 offloads 62 of 80 layers: the first 18 stay in RAM."""
    homes = layer_homes(cases["L233"])
    assert min(homes) == 18
    assert len(homes) == 62


@pytest.mark.parametrize(
    ("text", "arch", "found"),
    [
        ("DeepSeek R1 0528 Qwen3 8B / DeepSeek-R1-0528-Qwen3-8B-IQ3_KT.gguf", "qwen3", "qwen3-8b"),
        ("unsloth_DeepSeek R1 BF16 / x.gguf", "deepseek2", "deepseek-r1"),
        ("Glm-4.5-Air / GLM-4.5-IQ4_KS.gguf", "glm4moe", "glm-4.5-air"),
        ("Qwen3.5 122B A10B", "", "qwen3.5-122b-a10b"),
        ("nobody knows this one", "", None),
    ],
)
def test_models_by_the_names_people_use(text: str, arch: str, found: str | None) -> None:
    """The longest known name inside the text wins, unless the architecture says otherwise."""
    model = find_model(text, arch)
    assert (model.id if model else None) == found


def a_row(**values: str) -> dict[str, str]:
    """A row of an R1 run on one card, with some cells replaced."""
    row = dict.fromkeys(REQUIRED, "")
    row |= {"case_id": "a", "source_url": "u", "engine": "ik", "engine_date": "2025-08-01"}
    row |= {"model": "DeepSeek-R1", "n_ctx": "4096", "n_ubatch": "512", "mla": "3", "fa": "1"}
    row |= {"device": "CUDA0", "kv_mib": "274.5", "compute_mib": "800", "weights_mib": "20000"}
    return row | values


def test_a_bad_rule_is_skipped_not_fatal() -> None:
    """A pasted `-ot` that is no regex costs its own case only, and is named."""
    doc = backtest(parse_rows([a_row(ot_rules="blk.([=CPU"), a_row(case_id="b")]))
    why = {s["id"]: s["why"] for s in doc["skipped"]}
    assert "regex" in why["a/CUDA0/compute"]
    assert {r["id"] for r in doc["rows"]} == {"a/kv", "b/kv", "b/CUDA0/compute"}


def test_cache_types_from_the_log_line() -> None:
    """When the command is not shown, the engine's own line tells the types."""
    notes = "KV log: 1 MiB, K (q8_0): 1 MiB, V (q4_0): 1 MiB"
    (case,) = parse_rows([a_row(notes=notes)])
    assert (case.settings.ctk, case.settings.ctv) == ("q8_0", "q4_0")
    (case,) = parse_rows([a_row(notes="KV log: 1 MiB, c^KV (q6_0): 1 MiB, kv^T: not used")])
    assert case.settings.ctk == "q6_0"


def test_a_hybrid_keeps_a_state_per_sequence() -> None:
    """Perplexity over four sequences writes four rows of logits and keeps four states."""
    one = 4 * 248320 / MIB
    row = a_row(model="Qwen3.5 0.8B", mla="", device="CUDA_Host", output_mib=f"{4 * one:.2f}")
    (case,) = parse_rows([row])
    assert case.settings.parallel == 4


def test_a_partial_sum_of_caches_gives_way_to_the_total() -> None:
    """When a post leaves out cards, the engine's own total counts."""
    (case,) = parse_rows([a_row(kv_mib="100", notes="KV log: 274.50 MiB")])
    assert case.kv_total == 274.5


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    """A missing file, column or number is an error that names it."""
    with pytest.raises(BadFile, match="cannot be read"):
        read_logs(tmp_path / "gone.csv")
    with pytest.raises(BadFile, match="case_id"):
        parse_rows([{"model": "x"}])
    row = dict.fromkeys(REQUIRED, "") | {"case_id": "a", "engine": "ik", "n_ctx": "many"}
    with pytest.raises(BadFile, match="many"):
        parse_rows([row])


def test_an_empty_table_gives_an_empty_document(tmp_path: Path) -> None:
    """No rows: no figures, and no division by zero."""
    file = tmp_path / "empty.csv"
    file.write_text(",".join(REQUIRED) + "\n")
    doc = run(file)
    assert doc["n"] == 0
    assert doc["rows"] == doc["skipped"] == []
