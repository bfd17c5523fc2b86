"""How designs from tables of other tools are predicted: `python tests/bench/bench_tables.py DIR`.

DIR holds `models/NAME/kld_results.csv` and `recipes.tar.gz` of the GGUF Tool Suite. Every table of
a model with published perplexities predicts the mixes that were measured; nothing is fitted here.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from quantmix.errors import QuantmixError
from quantmix.ggml import types
from quantmix.ggml.types import GgmlType
from quantmix.loss import evidence, measured_recipes
from quantmix.loss.measured import MeasuredModel
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.offers import offers
from quantmix.table_import import import_table

LEAST_RISE = 0.003  # ln PPL; below it is noise
BY_NAME = {n: q for engine in ("mainline", "ik") for n, q in types.table(engine).items()}

Mix = list[GgmlType | None]


def mixes(model: Model, recipes: list[measured_recipes.MeasuredRecipe]) -> list[tuple[float, Mix]]:
    """Return (measured PPL, mix) of published mixes and of recipes of a model."""
    found: list[tuple[float, Mix]] = []
    for offer in offers([model.id]).files:
        assert offer.published is not None
        mix = [BY_NAME[t.source_type] if t.quantizable else None for t in offer.model.tensors]
        by_name = dict(zip((t.name for t in offer.model.tensors), mix, strict=True))
        if offer.published.imatrix:
            found.append((offer.published.ppl, [by_name.get(t.name) for t in model.tensors]))
    for r in recipes:
        if r.model == model.id:
            found.append((r.ppl, [BY_NAME[n] if n else None for n in r.types]))
    return found


def main() -> None:
    """Print a line per table and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    recipes, _ = measured_recipes.read(folder / "recipes.tar.gz")
    inside: list[float] = []
    levels: list[float] = []
    for file in sorted(folder.glob("models/*/kld_results.csv")):
        name = evidence.catalog_id(file.parent.name)
        base = evidence.base_ppl(name) if name else None
        if name is None or base is None:
            continue
        model = load_model(name)
        try:
            known = mixes(model, recipes)
        except QuantmixError:
            continue
        loss = MeasuredModel.of(model, import_table(file, model))
        ratios, hits = [], []
        for ppl, mix in known:
            rise = math.log(ppl / base)
            if rise < LEAST_RISE:
                continue
            q = loss.quality(model, mix)
            assert q.ln_ppl_ratio_low is not None
            assert q.ln_ppl_ratio_high is not None
            ratios.append(math.log(q.ln_ppl_ratio / rise))
            hits.append(q.ln_ppl_ratio_low <= rise <= q.ln_ppl_ratio_high)
        if ratios:
            levels.append(float(np.median(ratios)))
            inside.append(float(np.mean(hits)))
            print(
                f"{name:32} {len(ratios):3} mixes, predicted rise {math.exp(levels[-1]):5.2f} of "
                f"the measured one, {inside[-1]:4.0%} inside"
            )
    print(
        f"{len(levels)} tables: level off by {np.sqrt(np.mean(np.square(levels))):.2f} (ln, rms), "
        f"{np.mean(inside):.0%} inside on average by model"
    )


if __name__ == "__main__":
    main()
