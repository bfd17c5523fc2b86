"""Refit the safety margins from a logs table: `python -m quantmix.memory.fit [--logs FILE]`.

Per regime a factor, and one addition for all:

    factor = (n · q + k · q_all) / (n + k)    q = quantile of (measured - addition) / upper estimate

The pull towards all rows (k rows' worth) keeps regimes with few rows honest. The same fit without
each thread in turn gives the coverage to expect on threads not seen.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np

from quantmix.memory.evidence import Evidence, compute_evidence
from quantmix.memory.logs import read_logs
from quantmix.memory.margins import Margin
from quantmix.units import MIB

QUANTILE: Final = 0.99
ADD_MIB: Final = 64.0
PULL: Final = 8
MIN_FACTOR: Final = 1.02


@dataclass(frozen=True, slots=True)
class Coverage:
    """How good a bound is: share of rows it covers and its median slack."""

    n: int
    share: float
    median_slack_bytes: float
    median_slack_share: float


def fit_margins(rows: Sequence[Evidence], quantile: float = QUANTILE) -> dict[str, Margin]:
    """Return margins per regime fitted to `rows`; `*` serves regimes without rows."""
    if not rows:
        return {"*": Margin("*", 1.2, round(ADD_MIB * MIB))}
    everything = _quantile(rows, quantile)
    table = {"*": _margin("*", everything)}
    for name in sorted({r.regime for r in rows}):
        mine = [r for r in rows if r.regime == name]
        n = len(mine)
        factor = (n * _quantile(mine, quantile) + PULL * everything) / (n + PULL)
        table[name] = _margin(name, factor)
    return table


def coverage(rows: Sequence[Evidence], table: dict[str, Margin]) -> Coverage:
    """Return how the bounds of `table` do on `rows`."""
    return _coverage(rows, [r.bound_bytes(table) for r in rows])


def leave_one_thread_out(rows: Sequence[Evidence]) -> Coverage:
    """Return the coverage when each thread is judged by margins fitted without it."""
    bounds = []
    for url in sorted({r.url for r in rows}):
        table = fit_margins([r for r in rows if r.url != url])
        bounds += [(r, r.bound_bytes(table)) for r in rows if r.url == url]
    return _coverage([r for r, _ in bounds], [b for _, b in bounds])


def write_margins(table: dict[str, Margin], rows: Sequence[Evidence], path: Path) -> None:
    """Write a margins table with what it rests on."""
    n_of = {name: sum(r.regime == name for r in rows) for name in table}
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("regime", "factor", "add_mib", "source"))
        for name, margin in table.items():
            n = len(rows) if name == "*" else n_of[name]
            source = f"quantile {QUANTILE} of {n} logged buffers; python -m quantmix.memory.fit"
            out.writerow((name, f"{margin.factor:.4f}", f"{margin.add_bytes / MIB:g}", source))


def _margin(name: str, factor: float) -> Margin:
    return Margin(name, max(MIN_FACTOR, round(factor, 4)), round(ADD_MIB * MIB))


def _quantile(rows: Sequence[Evidence], quantile: float) -> float:
    ratios = [(r.measured_bytes - ADD_MIB * MIB) / r.upper_bytes for r in rows]
    return float(np.quantile(ratios, quantile, method="higher"))


def _coverage(rows: Sequence[Evidence], bounds: Sequence[int]) -> Coverage:
    if not rows:
        return Coverage(0, 0.0, 0.0, 0.0)
    slack = np.array([b - r.measured_bytes for r, b in zip(rows, bounds, strict=True)], float)
    capacity = np.array([r.capacity_bytes for r in rows], float)
    return Coverage(
        n=len(rows),
        share=float((slack >= 0).mean()),
        median_slack_bytes=float(np.median(slack)),
        median_slack_share=float(np.median(slack / capacity)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, print the coverage, and write margins.csv (or `--out`)."""
    parser = argparse.ArgumentParser(prog="python -m quantmix.memory.fit", description=__doc__)
    parser.add_argument("--logs", help="CSV of published logs (default: the shipped ones)")
    parser.add_argument("--out", help="file to write (default: the package's margins.csv)")
    args = parser.parse_args(argv)
    rows, skipped = compute_evidence(read_logs(args.logs))
    table = fit_margins(rows)
    out = Path(args.out or str(files("quantmix.memory") / "margins.csv"))
    write_margins(table, rows, out)
    for label, c in (("all", coverage(rows, table)), ("left out", leave_one_thread_out(rows))):
        print(
            f"{label}: {c.share:.1%} of {c.n} covered, median slack "
            f"{c.median_slack_bytes / MIB:.0f} MiB = {c.median_slack_share:.2%} of the card",
            file=sys.stderr,
        )
    print(f"{len(skipped)} rows not judged; written {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
