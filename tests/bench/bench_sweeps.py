"""Whole models left out, one type for every tensor, on another text than wiki.test.raw.

    python tests/bench/bench_sweeps.py --measurements CSV

Reads sweeps over types (rows labelled `pure TYPE` or `mostly TYPE`, with the perplexity of the
unquantized model) of a table as docs/loss-model.md describes it, and predicts each from the prior,
with the hyper-parameters fitted without its model. The sweeps were measured on the text that the
importance matrix was made of. Their *KLD* is in the type curve; their perplexities are in nothing.
Of types that count as one (interleaved ones) the first is taken. The last column is how much a
model rises there relative to what its published rows say of wiki.test.raw (median over rows that
rise by more than 1 %), where it has any.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from quantmix.loss import backtest, calibrate, cases, evidence, features, mixes, prior
from quantmix.loss.model import FloatArray
from quantmix.loss.predictor import FittedModel
from quantmix.models.sources import load_model

# The base is exact: every row of a sweep is paired with it.
_BASE_SD = 1e-6


def main() -> None:
    """Print error and coverage by model and band."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, required=True)
    sweeps: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in evidence.raw_rows(parser.parse_args().measurements):
        model = evidence.catalog_id(row["model"])
        if model and "group0" in row["label"] and row["base_ppl_bf16_or_q8"]:
            sweeps[model].append(row)
    found = {name: _score(name, rows) for name, rows in sweeps.items()}
    for name, scored in found.items():
        text = _against_wiki(name, sweeps[name])
        print(_line(name, scored) + (f"  {text:.2f} of wiki.test.raw" if text else ""))
    apart = {c.model.id for c in cases.gather(evidence.published())[0] if backtest.fails(c)}
    _total("all", list(found.values()))
    _total("without models shown apart", [s for n, s in found.items() if n not in apart])


def _total(name: str, found: list[list[tuple[float, float, bool]]]) -> None:
    everything = [s for scored in found for s in scored]
    for band, low, high in ((">=3.3", 3.3, 99.0), ("2.3-3.3", 2.3, 3.3), ("<2.3", 0.0, 2.3)):
        print(_line(f"{name}, {band}", [s for s in everything if low <= s[0] < high]))
    print(_line(name, everything))
    print(f"mean over {len(found)} models: {np.mean([_inside(s) for s in found]):.0%}")


def _mixes(name: str, rows: list[dict[str, str]]) -> list[tuple[FloatArray, float, float]]:
    """Return features, bits and measured rise of each mix that quantizes something, once."""
    model = load_model(name)
    share = prior.shares(model)
    out: dict[bytes, tuple[FloatArray, float, float]] = {}
    for row in rows:
        chances = mixes.resolve(model, row["mix"], share)
        w = features.of_fractions(model, share, chances)
        rise = math.log(float(row["ppl"]) / float(row["base_ppl_bf16_or_q8"]))
        if w.any() and rise != 0.0:
            out.setdefault(w.tobytes(), (w, evidence.bits_of(model, chances), rise))
    return list(out.values())


def _against_wiki(name: str, rows: list[dict[str, str]]) -> float | None:
    loss = FittedModel.of(load_model(name))
    if not any(r.exact for r in loss.bench.rows):
        return None
    base = loss.bench.ln_base
    rises = [(rise, loss.of_features(w).ln_ppl - base) for w, _, rise in _mixes(name, rows)]
    return float(np.median([rise / expected for rise, expected in rises if rise > 0.01]))


def _score(name: str, rows: list[dict[str, str]]) -> list[tuple[float, float, bool]]:
    """Return bits, ln(predicted / measured) and whether it lies inside 90 %, by mix."""
    model = load_model(name)
    h = backtest.without(name)
    known = calibrate.prior(0.0, _BASE_SD, model.n_elements, prior.scale_law(model), h)
    posterior = calibrate.fit([], known, h)
    out = []
    for w, bits, rise in _mixes(name, rows):
        p = calibrate.predict(posterior, w, h)
        low, high = p.interval(h)
        out.append((bits, p.ln_ppl - rise, low <= rise <= high))
    return out


def _inside(scored: list[tuple[float, float, bool]]) -> float:
    return float(np.mean([inside for _, _, inside in scored]))


def _line(name: str, scored: list[tuple[float, float, bool]]) -> str:
    error = np.median([math.expm1(e) for _, e, _ in scored])
    return f"{name:34} {len(scored):4} median {error:+7.2%} inside {_inside(scored):4.0%}"


if __name__ == "__main__":
    main()
