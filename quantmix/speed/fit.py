"""Refits the constants of the speed model: `python -m quantmix.speed.fit [--logs FILE]`.

Every constant is fitted in its logarithm, by least squares on ln(predicted/measured) with a loss
that is linear beyond 8 %, and drawn towards the prior below as if that were one more row with 60 %
noise (rows: 15 %): classes with a single machine stay near it. Rows of one case share one vote.
The band is the 90 % quantile of |ln(predicted/measured)| when the group of rows that share rig and
model family is left out of the fit; the calibrated band scales each rig by its other cases.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from math import exp, log, sqrt
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from quantmix.speed.constants import Constants
from quantmix.speed.logs import Row, read_logs
from quantmix.speed.roofline import prompt_seconds, token_seconds

Key = tuple[str, str]
_SPREAD: Final = 0.6
_ROW_NOISE: Final = 0.15
_LINEAR_BEYOND: Final = 0.08
_MOST_SHARE: Final = 0.98  # no memory is read faster than its bandwidth
SHORT: Final = 1000  # n_kv below which a row is about weights, not about the cache

# Where the fit starts and what it falls back to; units in the name, shares without.
_TG_PRIORS: Final[dict[Key, float]] = {
    ("eta_gpu", "ampere"): 0.75,
    ("eta_gpu", "ada"): 0.9,
    ("eta_gpu", "blackwell"): 0.6,
    ("eta_gpu", "uma"): 0.9,
    ("eta_gpu", "apple"): 0.5,
    ("eta_gpu", "datacenter"): 0.5,
    ("eta_gpu", "other"): 0.6,
    ("eta_cpu", "desktop_ddr5"): 0.7,
    ("eta_cpu", "desktop_ddr4"): 0.7,
    ("eta_cpu", "server_zen_ddr5"): 0.55,
    ("eta_cpu", "server_zen_ddr4"): 0.45,
    ("eta_cpu", "xeon_ddr5"): 0.6,
    ("eta_cpu", "xeon_mrdimm"): 0.3,
    ("eta_cpu", "hedt_ddr4"): 0.5,
    ("eta_cpu", "xeon_ddr4"): 0.45,
    ("eta_cpu", "other"): 0.5,
    ("og_ms", "dense"): 0.05,
    ("og_ms", "moe"): 0.08,
    ("og_ms", "mla"): 0.12,
    ("oc_ms", "layer"): 0.1,
    ("oh_ms", "layer"): 0.15,
    ("kvq_ms", "layer"): 0.02,
    ("eta_kv_gpu", "gqa"): 0.5,
    ("eta_kv_cpu", "gqa"): 0.5,
    ("eta_kv_gpu", "mla"): 0.25,
    ("eta_kv_cpu", "mla"): 0.15,
    ("slow", "iq"): 1.1,
    ("slow", "iqk"): 1.1,
    ("slow", "iq1"): 1.3,
    ("slow", "trellis"): 1.2,
    ("full", "cpu"): 1.05,
    ("kappa", "zen4"): 0.8,
    ("kappa", "avx512"): 0.4,
    ("kappa", "avx2"): 0.3,
}
_PP_PRIORS: Final[dict[Key, float]] = {
    ("int8_share", "ampere"): 0.2,
    ("int8_share", "ada"): 0.2,
    ("int8_share", "blackwell"): 0.1,
    ("int8_share", "uma"): 0.15,
    ("int8_share", "datacenter"): 0.08,
    ("int8_share", "other"): 0.15,
    ("moe_gpu", "all"): 0.6,
    ("pcie_gbs", "ampere"): 12.0,
    ("pcie_gbs", "ada"): 14.0,
    ("pcie_gbs", "blackwell"): 30.0,
    ("pcie_gbs", "other"): 12.0,
    ("cpu_gflops", "zen4"): 250.0,
    ("cpu_gflops", "avx512"): 130.0,
    ("cpu_gflops", "avx2"): 130.0,
}


def tg_ratio(row: Row, constants: Constants) -> float | None:
    """ln(predicted / measured) tokens per second, None when nothing was measured."""
    if not row.tg_tps:
        return None
    return -log(token_seconds(row.load, constants) * row.tg_tps)


def pp_ratio(row: Row, constants: Constants) -> float | None:
    """The same for the prompt, None when a rate is unknown or nothing was measured."""
    seconds = prompt_seconds(row.load, row.ubatch, constants, uploads_from=row.uploads_from)
    if not row.pp_tps or seconds is None:
        return None
    return log(row.ubatch / seconds / row.pp_tps)


def fit(
    rows: Sequence[Row],
    priors: dict[Key, float],
    ratio: Callable[[Row, Constants], float | None],
) -> dict[Key, float]:
    """Return the constants that fit `rows`, drawn towards `priors`."""
    keys = list(priors)
    start = np.array([log(priors[k]) for k in keys])
    votes = Counter(r.case for r in rows)

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        constants = {k: exp(v) for k, v in zip(keys, x, strict=True)}
        data = [d / sqrt(votes[r.case]) for r in rows if (d := ratio(r, constants)) is not None]
        soft = [_huber(d) for d in data]
        drawn = _ROW_NOISE * (x - start) / _SPREAD
        return np.concatenate([soft, drawn])

    highest = [log(_MOST_SHARE) if k[0].startswith("eta_") else np.inf for k in keys]
    result = least_squares(residuals, start, bounds=(-np.inf, highest), max_nfev=60)
    return {k: exp(v) for k, v in zip(keys, result.x, strict=True)}


def left_out(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """ln(predicted/measured) of every row under constants fitted without its group."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    found: list[tuple[Row, float]] = []
    for group, members in groups.items():
        constants = fit([r for r in rows if r.group != group], _TG_PRIORS, tg_ratio)
        found += [(r, d) for r in members if (d := tg_ratio(r, constants)) is not None]
    return found


def calibrated(pairs: Sequence[tuple[Row, float]]) -> list[float]:
    """Residuals after scaling each rig by the median of its other cases."""
    by_rig: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row, d in pairs:
        by_rig[row.rig].append((row.case, d))
    out: list[float] = []
    for members in by_rig.values():
        for case, d in members:
            others = [x for c, x in members if c != case]
            if others:
                out.append(d - float(np.median(others)))
    return out


def _huber(d: float) -> float:
    """Residual whose square is quadratic near zero and linear beyond."""
    size = abs(d)
    if size <= _LINEAR_BEYOND:
        return d
    return sqrt(2 * _LINEAR_BEYOND * size - _LINEAR_BEYOND**2) * (1 if d > 0 else -1)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and write `constants.csv` beside this module (or `--out`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logs", help="CSV of speed logs (default: those beside this module)")
    parser.add_argument("--out", default=str(Path(__file__).with_name("constants.csv")))
    args = parser.parse_args(argv)
    rows = [r for r in read_logs(args.logs)[0] if r.usable]
    tg = [r for r in rows if r.tg_tps]
    pp = [r for r in rows if r.pp_tps and r.n_kv < SHORT]
    constants = fit(tg, _TG_PRIORS, tg_ratio) | fit(pp, _PP_PRIORS, pp_ratio)
    residuals = left_out(tg)
    short = [(r, d) for r, d in residuals if r.n_kv < SHORT]
    band = float(np.quantile(np.abs([d for _, d in short]), 0.9))
    scaled = calibrated(short)
    band_cal = float(np.quantile(np.abs(scaled), 0.9)) if scaled else band
    source = (
        f"fitted on {len(tg)} TG and {len(pp)} PP rows of published logs by "
        "python -m quantmix.speed.fit"
    )
    with Path(args.out).open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["name", "key", "value", "source"])
        for (name, key), value in constants.items():
            prior = (_TG_PRIORS | _PP_PRIORS)[name, key]
            untouched = abs(log(value / prior)) < 1e-4
            why = "assumed: no log speaks of it" if untouched else source
            out.writerow([name, key, f"{value:.4g}", why])
        note = f"90 % quantile over {len(short)} rows, their group left out of the fit"
        out.writerow(["band_ln", "plain", f"{band:.4g}", note])
        out.writerow(["band_ln", "calibrated", f"{band_cal:.4g}", note + ", rig scaled by others"])
    errors = np.abs([exp(-d) - 1 for _, d in short])
    print(f"left out: n {len(short)}, median {np.median(errors):.1%}, band ±{exp(band) - 1:.0%}")


if __name__ == "__main__":
    main()
