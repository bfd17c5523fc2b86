"""Models that the loss model had never seen, scored once (issue 4, criterion 3).

    python tests/bench/bench_unseen.py [--rows FILE]

Two tables of perplexities that people published, each found after the parameters that scored it
were fixed, and scored by them exactly once:

- `unseen/measured.csv`, eight models on wiki.test.raw at context 512, by commit 2b923b6. The other
  half of the models found (by the hash of their name) was looked at before and is not here. Two of
  the eight count in the prior since and are marked.
- `unseen/measured-2.csv`, eighteen models, by commit 9fa5d95. Most are finetunes of Llama 2 whose
  authors do not name the text.

Where an author names a preset of llama-quantize, the mix is what a dry run of the real engine
gives. Shapes that are not in the catalog lie beside the tables; they were written by hand, without
a page to cite. Those of EXAONE, Qwen-14B and the Llama 3 models give the published sizes within
1.5 %, that of Ling-1T (in the form of glm4_moe: its fused q, k and v count singly) gives all seven
published bpw to 0.003; for Llama 2's finetunes and OpenLLaMA no size was found to check. One row of
Ling-1T (smol-IQ2_XXS) stood in the table that the fit is curated from, without a base, unused.
Every row is predicted by the prior alone, whatever is published of the model by now.

Two more tables are of criterion 2: files of one model whose mixes were found after 1ad61a6, which
scored them once, from the model's other published rows (by now some of them calibrate it; here they
never do).

- `unseen/deepseek-r1-0528.csv`: six files whose perplexity was known all along and a seventh found
  with it; median error 0.38 %, all inside. Of five the page does not list the types (`mix_from`):
  those are the mix that gives the published size, and where an author raised some layers, how many
  and not which (numbers of tensors: from a survey of headers whose page the index does not name).
  Nobody says whether DQ4_K_R4 had a matrix; it was scored as having none.
- `unseen/kimi-k2-instruct.csv`: thirteen files, median error 1.6 %, nine inside. This led to the
  finding that the first ones (v0.1) were made with a matrix that lacked two tensors of attention;
  their like calibrated the model then. The types of experts follow from name and exact size.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from quantmix.ggml.types import ENGINES, GgmlType, table
from quantmix.loss import calibrate, evidence, features, mixes, prior
from quantmix.loss.predictor import FittedModel
from quantmix.models.sources import load_model

HERE = Path(__file__).parent / "unseen"
FITTED_SINCE = frozenset({"llama-3-70b", "qwen2.5-coder-7b-instruct"})


def main() -> None:
    """Print error and coverage by model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=Path,
        action="append",
        help="a table of the first two kinds; default: all four",
    )
    chosen = parser.parse_args().rows
    for file in chosen or sorted(HERE.glob("measured*.csv")):
        print(file.name)
        _report(_read(file))
    for name in [] if chosen else ["deepseek-r1-0528", "kimi-k2-instruct"]:
        print(f"{name}.csv")
        _report_known(_read(HERE / f"{name}.csv"))


def _read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def _report_known(rows: list[dict[str, str]]) -> None:
    """Print the files of one model, each predicted from its published rows without all of them."""
    model = load_model(rows[0]["model"])
    share = prior.shares(model)
    labels = {row["label"] for row in rows}
    # "IQ3_KS (ubergarm, author value)" is the same file, measured again.
    names = tuple(label.rstrip(")") for label in labels)
    known = [p for p in evidence.of_model(model) if not p.label.startswith(names)]
    scored = []
    for row in rows:
        bench = evidence.bench(model, share, known)
        loss = FittedModel.on_bench(model, share, bench, imatrix=row["imatrix"] == "yes")
        w = features.of_fractions(model, share, mixes.resolve(model, row["mix"], share))
        p = loss.of_features(w)
        low, high = p.interval(calibrate.hyper())
        measured = math.log(float(row["ppl"]))
        scored.append((abs(math.expm1(p.ln_ppl - measured)), low <= measured <= high))
        print(
            f"{row['label']:34} measured {float(row['ppl']):.4f} "
            f"predicted {math.exp(p.ln_ppl):.4f} [{math.exp(low):.4f}, {math.exp(high):.4f}]"
        )
    print(_line("all", scored))


def _report(rows: list[dict[str, str]]) -> None:
    found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for row in rows:
        found[row["model"]].append(_score(row))
    print(f"{'model':34} {'n':>4} {'median':>8} {'inside':>7}")
    for name, scored in found.items():
        print(_line(name + (" *" if name in FITTED_SINCE else ""), scored))
    print(_line("all", [s for scored in found.values() for s in scored]))
    inside = [float(np.mean([i for _, i in scored])) for scored in found.values()]
    print(
        f"mean over {len(inside)} models: {np.mean(inside):.0%} inside; * counts in the prior since"
    )


def _score(row: dict[str, str]) -> tuple[float, bool]:
    """Return |predicted / measured - 1| of the perplexity, and whether it lies inside 90 %."""
    folder = HERE / row["model"]
    model = load_model(str(folder) if folder.is_dir() else row["model"])
    loss = FittedModel.of(model, imatrix=row["imatrix"] == "yes", measured=[])
    chances = mixes.resolve(model, row["mix"], prior.shares(model))
    types = [_type(max(c, key=lambda q: c[q])) if c else None for c in chances]
    quality = loss.quality(model, types)
    rise = math.log(float(row["ppl"]) / float(row["base_ppl"]))
    low, high = quality.ln_ppl_ratio_low, quality.ln_ppl_ratio_high
    assert low is not None
    assert high is not None
    return abs(math.expm1(quality.ln_ppl_ratio - rise)), low <= rise <= high


def _type(name: str) -> GgmlType | None:
    types = [table(e)[name] for e in ENGINES if name in table(e)]
    return types[0] if types and types[0].is_quantized else None


def _line(name: str, scored: list[tuple[float, bool]]) -> str:
    errors, inside = zip(*scored, strict=True)
    return f"{name:34} {len(scored):4} {np.median(errors):8.2%} {np.mean(inside):7.0%}"


if __name__ == "__main__":
    main()
