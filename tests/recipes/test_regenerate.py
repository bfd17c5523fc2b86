"""The committed recipes are what the tool makes today."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def _script() -> object:
    spec = importlib.util.spec_from_file_location("regenerate", RECIPES / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


@pytest.mark.engine
@pytest.mark.parametrize("request_", SCRIPT.REQUESTS, ids=lambda r: r.vram or r.gpus)  # type: ignore[attr-defined]
def test_a_committed_recipe_is_what_the_tool_makes(request_: object, tmp_path: Path) -> None:
    """Texts are equal to the byte, figures exist; on another solver version damage agrees."""
    made = SCRIPT.make(request_, tmp_path)  # type: ignore[attr-defined]
    committed = RECIPES / made.name
    for new in sorted((tmp_path / made.name).iterdir()):
        old = committed / new.name
        assert old.exists(), f"{old} is missing: run `make recipes`"
        if new.suffix == ".png":
            assert old.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        elif new.read_bytes() != old.read_bytes():
            before = json.loads((committed / "recipe.json").read_text())["quality"]["damage"]
            assert made.quality.damage == pytest.approx(before, rel=2e-4), (
                f"{new.name} differs: run `make recipes`"
            )
            pytest.fail(f"{new.name} differs from the committed one: run `make recipes`")
