"""Make the recipes of this folder again: `python recipes/regenerate.py [--into FOLDER]`.

A test makes them in a scratch folder and compares them with what is committed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from quantmix.engine.ghost import check
from quantmix.recipe import Recipe
from quantmix.request import Request, fulfil

HERE = Path(__file__).parent
CREATED = "2026-11-25T00:00:00Z"

REQUESTS = (
    Request("deepseek-r1", vram="192G"),
    Request("deepseek-r1", gpus="2xrtx-pro-6000"),
)


def make(request: Request, into: Path) -> Recipe:
    """Design, check with the engine and write one recipe with a fixed date."""
    answer = fulfil(replace(request, out=into, no_check=True))
    recipe = replace(answer.recipe, created=CREATED)
    result = check(recipe, answer.model)
    assert result.ok, result.problems[:3]
    recipe = replace(recipe, check=result.to_json())
    recipe.save(into / recipe.name)
    return recipe


def main() -> None:
    """Make every recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=HERE)
    into = parser.parse_args().into
    for request in REQUESTS:
        recipe = make(request, into)
        print(f"{recipe.name}: {recipe.size.bpw:.4f} bpw, gap {recipe.optimality.gap:.1e}")


if __name__ == "__main__":
    main()
