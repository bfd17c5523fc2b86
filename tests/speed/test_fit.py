"""The fit of the speed constants finds what made the data."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from quantmix.speed import fit as fitting
from quantmix.speed.constants import constants
from quantmix.speed.logs import Row, read_logs
from quantmix.speed.roofline import Load, Reader, token_seconds


def made_rows(eta: float, og_ms: float) -> list[Row]:
    """Rows of a machine whose GPU reaches `eta` of its bandwidth and loses `og_ms` per layer."""
    truth = dict(constants()) | {("eta_gpu", "ampere"): eta, ("og_ms", "dense"): og_ms}
    rows = []
    for i, gigabytes in enumerate((2, 4, 8, 16, 24, 32)):
        for layers in (20, 60, 100):
            reader = Reader(gigabytes * 1e9, 0.0, 900.0, "ampere")
            load = Load("dense", (reader,), None, layers, 0, 0, 0.0, 8, "zen4")
            tps = 1 / token_seconds(load, truth)
            name = f"{i}-{layers}"
            rows.append(
                Row(name, name, name, "rig", "m", "gpu", 0, 512, load, tps, None, True, None)
            )
    return rows


def test_the_fit_recovers_the_constants_that_made_the_rows() -> None:
    """Efficiency and per-layer cost come back within 5 % from rows made with them."""
    got = fitting.fit(made_rows(0.5, 0.2), fitting._TG_PRIORS, fitting.tg_ratio)
    assert got["eta_gpu", "ampere"] == pytest.approx(0.5, rel=0.05)
    assert got["og_ms", "dense"] == pytest.approx(0.2, rel=0.05)


def test_constants_without_data_stay_at_their_prior() -> None:
    """A class that no row speaks of keeps the value the fit started from."""
    got = fitting.fit(made_rows(0.5, 0.2), fitting._TG_PRIORS, fitting.tg_ratio)
    assert got["eta_cpu", "hedt_ddr4"] == pytest.approx(fitting._TG_PRIORS["eta_cpu", "hedt_ddr4"])


def test_a_rig_is_scaled_by_its_other_cases() -> None:
    """Residuals common to a rig vanish; a single case has nothing to be scaled by."""
    rows = made_rows(0.5, 0.2)[:3]
    assert fitting.calibrated([(r, 0.3) for r in rows]) == pytest.approx([0.0, 0.0, 0.0])
    assert fitting.calibrated([(replace(rows[0], rig="alone"), 0.3)]) == []


def test_the_command_writes_every_constant_with_its_source(logs: Path, tmp_path: Path) -> None:
    """The CSV that it writes has all keys of the shipped one, each with a source."""
    out = tmp_path / "constants.csv"
    fitting.main(["--logs", str(logs), "--out", str(out)])
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert {(r["name"], r["key"]) for r in rows} == set(constants())
    known = ("speed.fit", "quantile", "assumed")
    assert all(any(word in r["source"] for word in known) for r in rows)
    assert len(read_logs(logs)[0]) == 5
