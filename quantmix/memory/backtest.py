"""How good the memory predictions are, against a table of published engine logs.

Bands: `kv` (whole cache per case), `output` (logits buffers: a whole number of rows), `compute`
(GPU buffers of ik builds since 2025-03-18), `fits` (the upper bound that a plan rests on), `split`
(layers per GPU by `-ts`, from the cache that each card holds).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from quantmix.errors import QuantmixError
from quantmix.memory.compute import output_bytes
from quantmix.memory.evidence import Evidence, compute_evidence
from quantmix.memory.fit import coverage, leave_one_thread_out
from quantmix.memory.kv import kv_bytes
from quantmix.memory.logs import LogCase, read_logs
from quantmix.memory.margins import margins
from quantmix.memory.split import IK_SPLITS_BYTES, homes_by_count, splits_bytes
from quantmix.units import MIB

_KV_TOLERANCE: Final = 0.001
_OUTPUT_ROUNDING_MIB: Final = 0.0051  # logs print two decimals


def run(logs: str | Path | None = None) -> dict[str, Any]:
    """Return the document of `backtest memory` for a table of memory logs (default: ours).

    Its keys: docs/interface.md, backtest.

    Raises:
        BadFile: not a table of memory logs.
    """
    return backtest(read_logs(logs))


def backtest(cases: tuple[LogCase, ...]) -> dict[str, Any]:
    """Return bands, one row per judged figure (sizes in MiB), and every figure not judged."""
    evidence, skipped = compute_evidence(cases)
    bands: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name, judge in (("kv", _kv), ("output", _output), ("split", _split)):
        found: list[dict[str, Any]] = []
        for case in cases:
            more, why = judge(case)
            found += more
            skipped += why
        bands.append(_exact_band(name, found))
        rows += found
    rows += [_compute_row(e) for e in evidence]
    bands += [_compute_band(evidence), _fits_band(evidence)]
    return {
        "n": len(rows),
        "unit": "MiB",
        "bands": bands,
        "controls": {"cases": len(cases), "regimes": _by_regime(evidence)},
        "rows": rows,
        "skipped": skipped,
    }


Judged = tuple[list[dict[str, Any]], list[dict[str, str]]]


def _kv(case: LogCase) -> Judged:
    """The whole cache of one case, within 0.1 %."""
    name = f"{case.id}/kv"
    why = ""
    if case.kv_total is None:
        why = "no cache size in the post"
    elif case.model is None:
        why = f"model {case.model_text[:60]!r} is not in the tables"
    elif "n_ctx" in case.unstated:
        why = "not stated: n_ctx"
    if why or case.model is None or case.kv_total is None:
        return [], [{"id": name, "why": why}]
    try:
        predicted = sum(kv_bytes(case.model, case.settings)) / MIB
    except QuantmixError as err:
        return [], [{"id": name, "why": str(err)}]
    good = abs(predicted / case.kv_total - 1) <= _KV_TOLERANCE
    return [_row(name, "kv", predicted, predicted, case.kv_total, good)], []


def _output(case: LogCase) -> Judged:
    """Logits buffers: four bytes per vocabulary entry times a whole number of rows."""
    found, why = [], []
    for device in case.devices:
        if not device.output:
            continue
        name = f"{case.id}/{device.name}/output"
        if case.model is None:
            why.append({"id": name, "why": f"model {case.model_text[:60]!r} is not in the tables"})
            continue
        one = output_bytes(case.model, case.settings, 1) / MIB
        predicted = max(1, round(device.output / one)) * one
        good = abs(predicted - device.output) <= _OUTPUT_ROUNDING_MIB
        found.append(_row(name, "output", predicted, predicted, device.output, good))
    return found, why


def _split(case: LogCase) -> Judged:
    """Layers per GPU by `-ts`, as MiB of cache; judged where the build splits by count."""
    ts = case.tensor_split
    if not ts or not case.gpus:
        return [], []
    name = f"{case.id}/split"
    s, held = case.settings, [g.kv for g in case.gpus]
    why = ""
    if case.model is None:
        why = f"model {case.model_text[:60]!r} is not in the tables"
    elif splits_bytes(s):
        why = f"ik since {IK_SPLITS_BYTES} splits by bytes; the post does not give them"
    elif len(ts) != len(held) or all(k is None for k in held):
        why = "the post does not show the cache of every card"
    elif case.split_mode == "row":
        why = "-sm row keeps the cache on one card"
    if why or case.model is None:
        return [], [{"id": name, "why": why}]
    ngl = case.offloaded[0] if case.offloaded else case.model.hparams.n_layer + 1
    try:
        per_layer = kv_bytes(case.model, s)
        homes = homes_by_count(ts, len(per_layer), ngl, s.engine)
    except QuantmixError as err:
        return [], [{"id": name, "why": str(err)}]
    found = []
    for i, gpu in enumerate(case.gpus):
        predicted = sum(b for b, home in zip(per_layer, homes, strict=True) if home == i) / MIB
        measured = gpu.kv or 0.0
        # q8_0 caches are logged a few KiB larger per layer (padding).
        good = abs(predicted - measured) <= max(0.06, 0.001 * measured)
        found.append(_row(f"{name}/{gpu.name}", "split", predicted, predicted, measured, good))
    return found, []


def _row(
    name: str, band: str, predicted: float, high: float, measured: float, good: bool
) -> dict[str, Any]:
    return {
        "id": name,
        "band": band,
        "predicted": round(predicted, 3),
        "low": round(predicted, 3),
        "high": round(high, 3),
        "measured": round(measured, 3),
        "ok": good,
    }


def _compute_row(e: Evidence) -> dict[str, Any]:
    bound = e.bound_bytes(margins())
    row = _row(
        e.id,
        "compute",
        e.estimate_bytes / MIB,
        bound / MIB,
        e.measured_bytes / MIB,
        bound >= e.measured_bytes,
    )
    return {**row, "regime": e.regime, "capacity": e.capacity_bytes // MIB}


def _exact_band(band: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A band of figures that must be exact: errors relative to what was measured."""
    errors = [abs(r["predicted"] - r["measured"]) / max(r["measured"], 1e-9) for r in rows]
    return {
        "band": band,
        "n": len(rows),
        **_quantiles(errors),
        "exact": _share([r["ok"] for r in rows]),
    }


def _compute_band(evidence: list[Evidence]) -> dict[str, Any]:
    errors = [abs(e.relative_error) for e in evidence]
    mib = [abs(e.estimate_bytes - e.measured_bytes) / MIB for e in evidence]
    return {
        "band": "compute",
        "n": len(evidence),
        **_quantiles(errors),
        "within_2pct": _share([x <= 0.02 for x in errors]),
        "within_5pct": _share([x <= 0.05 for x in errors]),
        "median_mib": float(np.median(mib)) if mib else None,
        "p95_mib": float(np.quantile(mib, 0.95)) if mib else None,
    }


def _fits_band(evidence: list[Evidence]) -> dict[str, Any]:
    """Coverage of the shipped bounds, and of bounds refitted without each thread."""
    shipped, left_out = coverage(evidence, margins()), leave_one_thread_out(evidence)
    return {
        "band": "fits",
        "n": shipped.n,
        "coverage": shipped.share,
        "median_slack_mib": shipped.median_slack_bytes / MIB,
        "median_slack_share": shipped.median_slack_share,
        "coverage_left_out": left_out.share,
        "median_slack_left_out_mib": left_out.median_slack_bytes / MIB,
    }


def _by_regime(evidence: list[Evidence]) -> list[dict[str, Any]]:
    table = []
    for name in sorted({e.regime for e in evidence}):
        mine = [e for e in evidence if e.regime == name]
        errors = [abs(e.relative_error) for e in mine]
        covered = [e.bound_bytes(margins()) >= e.measured_bytes for e in mine]
        table.append(
            {"regime": name, "n": len(mine), **_quantiles(errors), "coverage": _share(covered)}
        )
    return table


def _quantiles(errors: list[float]) -> dict[str, float | None]:
    if not errors:
        return {"median": None, "p90": None, "p95": None, "max": None}
    return {
        "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)),
        "p95": float(np.quantile(errors, 0.95)),
        "max": float(np.max(errors)),
    }


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
