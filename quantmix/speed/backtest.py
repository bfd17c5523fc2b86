"""How well the speed model predicts published logs (`quantmix backtest speed`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from math import exp, log
from pathlib import Path
from typing import Any, Final

import numpy as np

from quantmix.speed.constants import constants
from quantmix.speed.fit import SHORT, calibrated
from quantmix.speed.logs import Row, read_logs
from quantmix.speed.roofline import prompt_seconds, token_seconds

_DIFFERENT: Final = 1.05


def run(logs: str | Path | None = None) -> dict[str, Any]:
    """Return the document of `backtest speed` for a table of speed logs (default: shipped).

    Its keys: docs/interface.md, backtest.

    Bands: by where the model ran (`cpu`, `hybrid`, `gpu`) and `all`, for rows at n_kv < 1000, and
    `long` for the others; `controls` hold the direction of differences on one rig, the error after
    scaling each rig by its other cases, and of prompt speed.

    Raises:
        BadFile: not a table of speed logs.
    """
    rows, skipped = read_logs(logs)
    known = constants()
    judged: list[tuple[Row, float]] = []
    for row in rows:
        if not row.tg_tps:
            skipped.append({"id": row.id, "why": "no generation speed was reported"})
        elif not row.usable:
            skipped.append(
                {"id": row.id, "why": "marked unusable: two sockets, paging or misplaced"}
            )
        else:
            judged.append((row, 1 / token_seconds(row.load, known)))
    half = exp(known["band_ln", "plain"])
    return {
        "n": len(judged),
        "bands": _bands(judged, half),
        "controls": {
            **_pairs(judged),
            "calibrated": _calibrated(judged),
            "prompt": _prompt([r for r, _ in judged]),
        },
        "rows": [
            {
                "id": row.id,
                "predicted": round(tps, 4),
                "low": round(tps / half, 4),
                "high": round(tps * half, 4),
                "measured": row.tg_tps,
            }
            for row, tps in judged
        ],
        "skipped": skipped,
    }


def _bands(judged: Sequence[tuple[Row, float]], half: float) -> list[dict[str, Any]]:
    short = [(r, p) for r, p in judged if r.n_kv < SHORT]
    parts = {m: [(r, p) for r, p in short if r.mode == m] for m in ("cpu", "hybrid", "gpu")}
    parts["all"] = short
    parts["long"] = [(r, p) for r, p in judged if r.n_kv >= SHORT]
    return [{"band": name, **_figures(part, half)} for name, part in parts.items()]


def _figures(part: Sequence[tuple[Row, float]], half: float) -> dict[str, Any]:
    """Relative errors of predicted tokens per second, and how often the band holds them."""
    errors = np.array([abs(p / (r.tg_tps or 1) - 1) for r, p in part])
    ratios = np.array([abs(log(p / (r.tg_tps or 1))) for r, p in part])
    if not len(errors):
        return {"n": 0}
    return {
        "n": len(errors),
        "median": round(float(np.median(errors)), 4),
        "p90": round(float(np.quantile(errors, 0.9)), 4),
        "p95": round(float(np.quantile(errors, 0.95)), 4),
        "within_2pct": round(float(np.mean(errors <= 0.02)), 4),
        "within_5pct": round(float(np.mean(errors <= 0.05)), 4),
        "coverage90": round(float(np.mean(ratios <= log(half))), 4),
    }


def _pairs(judged: Sequence[tuple[Row, float]]) -> dict[str, Any]:
    """Direction of differences above 5 % between two cases on one rig.

    A case speaks once: by its first row below 1000 tokens of context. A prediction of no
    difference at all counts as wrong. `same_model` looks at mixes of one model only.
    """
    firsts: dict[str, tuple[Row, float]] = {}
    for row, tps in judged:
        if row.n_kv < SHORT:
            firsts.setdefault(row.case, (row, tps))
    rigs: dict[str, list[tuple[Row, float]]] = defaultdict(list)
    for row, tps in firsts.values():
        rigs[row.rig].append((row, tps))
    right = {"pairs": [0, 0], "same_model": [0, 0]}
    for members in rigs.values():
        for (a, p), (b, q) in combinations(members, 2):
            measured = (a.tg_tps or 1) / (b.tg_tps or 1)
            if max(measured, 1 / measured) <= _DIFFERENT:
                continue
            good = (measured - 1) * (p / q - 1) > 0
            for name in ("pairs", *(("same_model",) if a.model == b.model else ())):
                right[name][0] += good
                right[name][1] += 1
    return {
        name: {"n": n, "right": good, "share": round(good / n, 4) if n else None}
        for name, (good, n) in right.items()
    }


def _calibrated(judged: Sequence[tuple[Row, float]]) -> dict[str, Any]:
    """Error when each rig is scaled by the median of its other cases, at n_kv < 1000."""
    short = [(r, log(tps / (r.tg_tps or 1))) for r, tps in judged if r.n_kv < SHORT]
    errors = [abs(exp(d) - 1) for d in calibrated(short)]
    if not errors:
        return {"n": 0}
    return {
        "n": len(errors),
        "median": round(float(np.median(errors)), 4),
        "p90": round(float(np.quantile(errors, 0.9)), 4),
    }


def _prompt(rows: Sequence[Row]) -> dict[str, Any]:
    """Prompt speed at n_kv < 1000: median relative error, and how often within a factor of two."""
    known = constants()
    ratios = [
        row.ubatch / seconds / row.pp_tps
        for row in rows
        if row.pp_tps
        and row.n_kv < SHORT
        and (seconds := prompt_seconds(row.load, row.ubatch, known, uploads_from=row.uploads_from))
    ]
    if not ratios:
        return {"n": 0}
    errors = np.abs(np.array(ratios) - 1)
    within = np.mean([0.5 <= x <= 2 for x in ratios])
    return {
        "n": len(ratios),
        "median": round(float(np.median(errors)), 4),
        "within_factor_2": round(float(within), 4),
    }
