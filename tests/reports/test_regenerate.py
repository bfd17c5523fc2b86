"""The script that fills reports/: it works, and what is committed is what it makes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quantmix.recipe import load
from tests.report.test_pages import read

ROOT = Path(__file__).parents[2]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweeps", ROOT / "reports" / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweeps"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()
SMALL = next(s for s in SCRIPT.SERIES if s.model == "glm-4.5-air")


@pytest.mark.engine
@pytest.mark.slow
def test_a_series_is_designed_checked_and_drawn(tmp_path: Path) -> None:
    """Every recipe passes the engine's walk; the page, the plot and the README name them all."""
    made = SCRIPT.make_recipes(SMALL, tmp_path / "recipes")
    (tmp_path / "reports").mkdir()
    part = SCRIPT.make_report(SMALL, tmp_path / "recipes", tmp_path / "reports")
    page = read((tmp_path / "reports" / f"{SMALL.model}.html").read_text(encoding="utf-8"))
    shown = json.loads(page.document)["sections"][0]["recipes"]
    assert [r.name for r in made] == SMALL.names == [r["name"] for r in shown]
    assert all(r.check and r.check["ok"] for r in made)
    assert all(name in part for name in SMALL.names)
    for recipe in made:
        committed = ROOT / "recipes" / recipe.name
        if (committed / "recipe.json").exists():
            assert load(committed).tensors == recipe.tensors, (
                f"{recipe.name} differs from the committed one: run `python reports/regenerate.py`"
            )


def test_series_name_models_of_the_catalog_once() -> None:
    """Models are catalog ids, sizes ascend, names are unique."""
    from quantmix.models.catalog import find

    names = [name for series in SCRIPT.SERIES for name in series.names]
    assert len(names) == len(set(names)) == 13
    for series in SCRIPT.SERIES:
        assert find(series.model).id == series.model
        assert list(series.sizes) == sorted(series.sizes)


@pytest.mark.parametrize("page", sorted((ROOT / "reports").glob("*.html")), ids=lambda p: p.stem)
def test_a_committed_page_shows_the_committed_recipes(page: Path) -> None:
    """Sizes and perplexities on a page are those of the recipes in recipes/."""
    document = json.loads(read(page.read_text(encoding="utf-8")).document)
    for section in document["sections"]:
        for row in section["recipes"]:
            place = ROOT / "recipes" / row["name"]
            if not place.exists():
                assert section["measured"], f"{row['name']} is neither in recipes/ nor measured"
                continue
            recipe = load(place)
            assert row["size"]["tensor_bytes"] == recipe.size.tensor_bytes
            assert row["quality"]["ln_ppl_ratio"] == recipe.quality.ln_ppl_ratio
