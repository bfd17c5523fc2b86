"""The commands `backtest` and `rigs`."""

from __future__ import annotations

import json

import typer
from typer.testing import CliRunner, Result

from quantmix.cli import backtest, rigs

APP = typer.Typer()
backtest.register(APP)
rigs.register(APP)


def call(*args: str) -> Result:
    """Run a command line of these two commands."""
    return CliRunner().invoke(APP, list(args))


def test_memory_backtest_needs_no_files() -> None:
    """One JSON document on stdout with the documented bands, from the shipped logs."""
    done = call("backtest", "memory", "--json", "--quiet")
    assert done.exit_code == 0
    doc = json.loads(done.stdout)
    assert {"kv", "output", "compute", "fits"} <= {b["band"] for b in doc["bands"]}
    assert {"id", "predicted", "low", "high", "measured"} <= set(doc["rows"][0])
    assert {"id", "why"} == set(doc["skipped"][0])


def test_backtest_options_of_the_wrong_kind_are_refused() -> None:
    """An option of another kind, a missing file and an unknown kind exit 2 with one line."""
    for args in (["memory", "--recipes", "x"], ["memory", "--logs", "/none.csv"], ["taste"]):
        assert call("backtest", *args).exit_code == 2


def test_rigs_as_json_and_as_tables() -> None:
    """Rigs and devices are listed; a total says which cards make it up."""
    doc = json.loads(call("rigs", "--json", "--total", "192G", "--quiet").stdout)
    assert "1x3090-128g" in {r["name"] for r in doc["rigs"]}
    assert "rtx-5090" in {d["key"] for d in doc["devices"]}
    assert "2xrtx-pro-6000" in {c["gpus"] for c in doc["total"]["cards"]}
    plain = call("rigs")
    assert plain.exit_code == 0
    assert plain.stdout == ""
    assert call("rigs", "--total", "lots").exit_code == 2
