"""`quantmix report` at the command line."""

from __future__ import annotations

import json
import sqlite3

import typer
from typer.testing import CliRunner

from quantmix.cli import report
from quantmix.store import Store
from tests.report.conftest import MODEL, measurement

app = typer.Typer()
report.register(app)


@app.command()
def other() -> None:
    """A second command, so that the group keeps its name."""


def call(*args: str):
    """Run a report command."""
    return CliRunner().invoke(app, ["report", *args])


def test_a_design_page_lies_beside_its_recipe(folder, recipes, tmp_path, monkeypatch):
    """The page goes next to recipe.json, and the document on stdout is the one inside it."""
    monkeypatch.setenv("QUANTMIX_DB", str(tmp_path / "none.db"))
    place = folder / recipes[0].name
    found = call("design", str(place), "--no-frontier", "--json", "--plot", str(tmp_path / "p.png"))
    assert found.exit_code == 0, found.stderr
    doc = json.loads(found.stdout)
    page = (place / "report.html").read_text(encoding="utf-8")
    embedded = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(embedded) == doc["document"]
    assert doc["page"] == str(place / "report.html")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (place / "report.html").unlink()


def test_a_sweep_page_and_its_plot(folder, recipes, tmp_path):
    """A sweep with measurements writes page and plot; the same call writes the same bytes."""
    with Store(tmp_path / "m.db") as store:
        store.add(measurement(recipes[0]))
    made = []
    for name in ("a", "b"):
        page, plot = tmp_path / f"{name}.html", tmp_path / f"{name}.svg"
        found = call("sweep", str(folder), "--db", str(tmp_path / "m.db"), "--model", MODEL,
                     "--out", str(page), "--plot", str(plot))  # fmt: skip
        assert found.exit_code == 0, found.stderr
        assert found.stdout == ""
        made.append((page.read_bytes(), plot.read_bytes()))
    assert made[0] == made[1]


def test_a_comparison_page(folder, recipes, tmp_path):
    """Recipes side by side make a page that names them all."""
    page = tmp_path / "c.html"
    places = [str(folder / r.name) for r in recipes]
    found = call("compare", *places, "--no-frontier", "--out", str(page), "--quiet")
    assert found.exit_code == 0, found.stderr
    text = page.read_text(encoding="utf-8")
    assert all(r.name in text for r in recipes)


def test_wrong_arguments_are_one_line_and_exit_2(folder, recipes, tmp_path):
    """No recipe, a foreign database, one recipe to compare, a plot of an unknown kind."""
    sqlite3.connect(tmp_path / "x.db").execute("create table t (a)")
    place = str(folder / recipes[0].name)
    for args in (
        ("design", str(tmp_path)),
        ("sweep", str(tmp_path / "x.db")),
        ("compare", place, "--out", str(tmp_path / "c.html")),
        ("design", place, "--no-frontier", "--out", str(tmp_path / "d.html"), "--plot", "a.gif"),
    ):
        found = call(*args)
        assert found.exit_code == 2, args
        assert found.stderr.startswith("quantmix: ")
        assert found.stderr.count("\n") == 1
