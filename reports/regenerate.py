"""Make the sweeps of this folder again: `python reports/regenerate.py [--into FOLDER] [MODEL …]`.

Each model is designed at every budget below and each recipe walked by the real engine; recipes go
to recipes/, a page and a plot per model to reports/, with a README that shows them all.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from quantmix.engine.ghost import check
from quantmix.files import write_text
from quantmix.loss import load as load_loss
from quantmix.models.sources import load_model
from quantmix.recipe import Recipe, load
from quantmix.report import data, figures, pages
from quantmix.report.build import subject_of
from quantmix.report.markdown import card_table
from quantmix.request import Request, fulfil
from quantmix.units import gib

ROOT = Path(__file__).parent.parent
CREATED = "2026-11-25T00:00:00Z"


@dataclass(frozen=True)
class Series:
    """One model at several sizes of a single device, in GiB."""

    model: str
    sizes: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """Names of its recipes."""
        return [f"{self.model}-{size}G" for size in self.sizes]


SERIES = (
    Series("deepseek-r1-0528", (128, 160, 192, 224, 256, 384)),
    Series("kimi-k2-instruct", (256, 512)),
    Series("qwen3-235b-a22b", (96, 128, 192)),
    Series("glm-4.5-air", (48, 64)),
)


def make_recipes(series: Series, into: Path) -> list[Recipe]:
    """Design, have the engine walk, and write every recipe of a series with a fixed date."""
    model = load_model(series.model)
    loss = load_loss(model)
    made = []
    for size in series.sizes:
        request = Request(series.model, vram=f"{size}G", out=into, no_check=True)
        recipe = replace(fulfil(request, model=model, loss=loss).recipe, created=CREATED)
        result = check(recipe, model)
        assert result.ok, result.problems[:3]
        recipe = replace(recipe, check=result.to_json())
        recipe.save(into / recipe.name)
        made.append(recipe)
    return made


def make_report(series: Series, recipes: Path, into: Path) -> str:
    """Write the page and the plot of a series; return its part of the README."""
    found = [load(recipes / name) for name in series.names]
    subject = subject_of(found, (), frontier=True)
    document = data.sweep_document([subject])
    section = document["sections"][0]
    write_text(into / f"{series.model}.html", pages.sweep_page(document))
    figures.save_curve(section, into / f"{series.model}.png")
    return (
        f"## {section['name']}\n\n![perplexity against size]({series.model}.png)\n\n"
        f"{card_table(section)}\n[The whole page]({series.model}.html): the frontier in numbers, "
        f"{len(section['frontier']['published'])} published mixes with their sources, residuals.\n"
    )


def demo_part(reports: Path) -> str:
    """Return the measured sweep of the demo model (`reports/demo.py`), when it is there."""
    file = reports / "smollm2-demo.json"
    if not file.exists():
        return ""
    rows = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "## SmolLM2 demo, measured\n\n![perplexity against size](smollm2-demo.png)\n",
        "Stock presets against recipes of at most the same bytes, same importance matrix, same "
        "text. [The whole page](smollm2-demo.html).\n",
        "| size of | stock KLD | our KLD | stock PPL | our PPL |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        ours = f"**{r['our_kld']:.5f}**" if r["kld_lower"] else f"{r['our_kld']:.5f}"
        lines.append(
            f"| {r['preset']} ({gib(r['stock_bytes'])}) | {r['stock_kld']:.5f} | {ours} "
            f"| {r['stock_ppl']:.4f} | {r['our_ppl']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is asked for, everything by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", help="only these models")
    parser.add_argument("--into", type=Path, default=ROOT, help="folder of recipes/ and reports/")
    parser.add_argument("--pages-only", action="store_true", help="keep the recipes that are there")
    asked = parser.parse_args()
    recipes, reports = asked.into / "recipes", asked.into / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Sweeps\n\nPredicted perplexity against size; every recipe below was walked tensor by "
        "tensor by the real engine. Made by `python reports/regenerate.py`.\n"
    ]
    for series in SERIES:
        if asked.models and series.model not in asked.models:
            continue
        started = time.perf_counter()
        if not asked.pages_only:
            make_recipes(series, recipes)
        parts.append(make_report(series, recipes, reports))
        print(f"{series.model}: {len(series.sizes)} recipes, {time.perf_counter() - started:.1f} s")
    if not asked.models:
        parts.append(demo_part(reports))
        write_text(reports / "README.md", "\n".join(p for p in parts if p))


if __name__ == "__main__":
    main()
