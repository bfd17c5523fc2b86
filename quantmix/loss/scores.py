"""Figures of merit of predictions: errors by band, coverage, order of pairs, bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from quantmix.loss.model import FloatArray
from quantmix.loss.outcome import Outcome, Pair

BANDS: Final = ((">=3.3", 3.3, 99.0), ("2.3-3.3", 2.3, 3.3), ("<2.3", 0.0, 2.3))
_DRAWS: Final = 2000
_SEED: Final = 20240229
# An error of more than e^3 is a wreck whatever its size.
_WORST_LN: Final = 3.0

Guess = Callable[[Outcome], float | None]


def error(guess: float, measured: float) -> float:
    """Return |PPL predicted / PPL measured - 1| of two ln PPL."""
    return float(abs(np.expm1(min(guess - measured, _WORST_LN))))


def bands(
    outcomes: Sequence[Outcome], guess: Guess = lambda o: o.predicted
) -> list[dict[str, Any]]:
    """Return one dict per band of bits per weight, and one for all together."""
    out = []
    for name, low, high in (*BANDS, ("all", 0.0, 99.0)):
        here = [o for o in outcomes if low <= o.bpw < high and guess(o) is not None]
        errors = np.array([error(guess(o) or 0.0, o.measured) for o in here])
        out.append({"band": name, "n": len(here), **_summary(errors, here)})
    return out


def _summary(errors: FloatArray, here: Sequence[Outcome]) -> dict[str, float | None]:
    if not len(errors):
        keys = ("median", "p90", "within_2pct", "within_5pct", "coverage90")
        return dict.fromkeys(keys)
    return {
        "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)),
        "within_2pct": float(np.mean(errors <= 0.02)),
        "within_5pct": float(np.mean(errors <= 0.05)),
        "coverage90": float(np.mean([o.covered for o in here])),
    }


def median_gain(outcomes: Sequence[Outcome], guess: Guess) -> list[dict[str, Any]]:
    """Return by band the median error of the control minus ours, with its bootstrap 95 % interval.

    Models are drawn with replacement, then rows within them: rows of one model resemble each other.
    Ours and the control's error of a row stay together.
    """
    out = []
    for name, low, high in BANDS:
        here = [o for o in outcomes if low <= o.bpw < high and guess(o) is not None]
        if len(here) < 5:
            continue
        ours = np.array([error(o.predicted, o.measured) for o in here])
        theirs = np.array([error(guess(o) or 0.0, o.measured) for o in here])
        draws = _clustered([o.model for o in here])
        spread = np.array([np.median(theirs[d]) - np.median(ours[d]) for d in draws])
        tails = np.array([np.quantile(theirs[d], 0.9) / np.quantile(ours[d], 0.9) for d in draws])
        out.append(
            {
                "band": name,
                "n": len(here),
                "median_gain": float(np.median(theirs) - np.median(ours)),
                "low": float(np.quantile(spread, 0.025)),
                "high": float(np.quantile(spread, 0.975)),
                "p90_ratio": float(np.quantile(theirs, 0.9) / np.quantile(ours, 0.9)),
                "p90_ratio_low": float(np.quantile(tails, 0.025)),
                "p90_ratio_high": float(np.quantile(tails, 0.975)),
            }
        )
    return out


def order(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the share of equal-size pairs put in the right order, next to both controls.

    The bootstrap draws models first, then pairs within them: pairs of one model are not
    independent. `superior` says whether the 95 % interval of the difference excludes zero.
    """
    right = {
        name: np.array([getattr(p, name) for p in pairs], dtype=np.float64)
        for name in ("ours", "bpw_only", "by_size")
    }
    n = len(pairs)
    if not n:
        return {"n": 0}
    draws = _clustered([p.model for p in pairs])
    doc: dict[str, Any] = {"n": n, "models": len({p.model for p in pairs})}
    for name, values in right.items():
        shares = np.array([values[d].mean() for d in draws])
        doc[name] = float(values.mean())
        doc[f"{name}_low"], doc[f"{name}_high"] = _ends(shares)
    for name in ("bpw_only", "by_size"):
        gain = right["ours"] - right[name]
        low, high = _ends(np.array([gain[d].mean() for d in draws]))
        doc[f"over_{name}"] = float(gain.mean())
        doc[f"over_{name}_low"], doc[f"over_{name}_high"] = low, high
        doc[f"superior_to_{name}"] = low > 0.0
    return doc


def _ends(values: FloatArray) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _clustered(labels: Sequence[str]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    rng = np.random.default_rng(_SEED)
    names = sorted(set(labels))
    members = {m: np.array([i for i, x in enumerate(labels) if x == m]) for m in names}
    out = []
    for _ in range(_DRAWS):
        chosen = rng.integers(0, len(names), len(names))
        parts = [members[names[c]] for c in chosen]
        out.append(np.concatenate([p[rng.integers(0, len(p), len(p))] for p in parts]))
    return out
