"""Whole models left out, one type for every tensor, on a text that nothing else here is about.

    python tests/bench/bench_sweeps.py --measurements CSV

Reads sweeps over types (rows labelled `pure TYPE` or `mostly TYPE`, with the perplexity of the
unquantized model) of a table as docs/loss-model.md describes it, and predicts each from the prior,
with the hyper-parameters fitted without its model. The sweeps were measured on the text that the
importance matrix was made of. Their *KLD* is in the type curve; their perplexities are in nothing.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from quantmix.loss import backtest, calibrate, evidence, features, mixes, prior
from quantmix.loss.fit import tables
from quantmix.models.sources import load_model

# The base is exact: every row of a sweep is paired with it.
_BASE_SD = 1e-6


def main() -> None:
    """Print error and coverage by model and band."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, required=True)
    sweeps: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in tables.read_measurements(parser.parse_args().measurements):
        model = evidence.catalog_id(row["model"])
        if model and "group0" in row["label"] and row["base_ppl_bf16_or_q8"]:
            sweeps[model].append(row)
    found = {name: _score(name, rows) for name, rows in sweeps.items()}
    for name, scored in found.items():
        print(_line(name, scored))
    everything = [s for scored in found.values() for s in scored]
    for name, low, high in ((">=3.3", 3.3, 99.0), ("2.3-3.3", 2.3, 3.3), ("<2.3", 0.0, 2.3)):
        print(_line(name, [s for s in everything if low <= s[0] < high]))
    print(_line("all", everything))
    print(f"mean over {len(found)} models: {np.mean([_inside(s) for s in found.values()]):.0%}")


def _score(name: str, rows: list[dict[str, str]]) -> list[tuple[float, float, bool]]:
    """Return bits, ln(predicted / measured) and whether it lies inside 90 %, by row."""
    model = load_model(name)
    share, h = prior.shares(model), backtest.without(name)
    known = calibrate.prior(0.0, _BASE_SD, model.n_elements, prior.family(model), h)
    posterior = calibrate.fit([], known, h)
    out = []
    for row in rows:
        chances = mixes.resolve(model, row["mix"], share)
        p = calibrate.predict(posterior, features.of_fractions(model, share, chances), h)
        low, high = p.bounds(h.quantiles_prior)
        rise = math.log(float(row["ppl"]) / float(row["base_ppl_bf16_or_q8"]))
        bits = evidence.bits_of(model, chances)
        out.append((bits, p.ln_ppl - rise, low <= rise <= high))
    return out


def _inside(scored: list[tuple[float, float, bool]]) -> float:
    return float(np.mean([inside for _, _, inside in scored]))


def _line(name: str, scored: list[tuple[float, float, bool]]) -> str:
    error = np.median([math.expm1(e) for _, e, _ in scored])
    return f"{name:34} {len(scored):4} median {error:+7.2%} inside {_inside(scored):4.0%}"


if __name__ == "__main__":
    main()
