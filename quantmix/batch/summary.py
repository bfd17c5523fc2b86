"""What a plan and a run come to, as plain JSON documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from quantmix.batch.estimate import estimate, pace
from quantmix.batch.items import Item
from quantmix.batch.run import Batch, Ended


def plan_document(batch: Batch) -> dict[str, Any]:
    """Return the plan: for every item its steps and why they run, with time and disk estimates.

    `seconds` sums the due steps one after another; steps `later` are counted though they are
    spared when nothing changes before them.
    """
    folder = batch.pipeline.folder
    rates = pace(batch.items, batch.state, folder)
    rows = []
    counts: Counter[str] = Counter()
    seconds, file_bytes = 0.0, 0
    for item in batch.items:
        judged = batch.judge(item)
        found = estimate(item, judged, rates, folder)
        seconds += found.seconds
        file_bytes += found.file_bytes
        counts.update(j.verdict for j in judged)
        rows.append(
            {
                **_about(item, batch),
                "steps": [{"step": j.step, "plan": j.verdict, "reason": j.reason} for j in judged],
                "seconds": round(found.seconds, 1),
                "file_bytes": found.file_bytes,
            }
        )
    names = ("done", "run", "later", "failed", "blocked")
    return {
        "pipeline": str(batch.pipeline.file),
        "out": str(batch.pipeline.out),
        "dry_run": True,
        "counts": {name: counts[name] for name in names},
        "seconds": round(seconds, 1),
        "file_bytes": file_bytes,
        "items": rows,
    }


def run_document(batch: Batch, ended: Sequence[Ended]) -> dict[str, Any]:
    """Return the summary of a run: what became of every step, and the figures of every item."""
    counts = Counter(step.what for e in ended for step in e.steps)
    names = ("done", "ran", "failed", "blocked")
    return {
        "pipeline": str(batch.pipeline.file),
        "out": str(batch.pipeline.out),
        "dry_run": False,
        "counts": {name: counts[name] for name in names},
        "items": [_ended(e, batch) for e in ended],
    }


def exit_code(ended: Sequence[Ended]) -> int:
    """Return 0 when every step holds, else the exit code of the first failure."""
    return next((e.failure.code or 1 for e in ended if e.failure is not None), 0)


def _about(item: Item, batch: Batch) -> dict[str, Any]:
    return {
        "job": item.job.number,
        "model": item.job.model,
        "budget": item.budget,
        "recipe": str(batch.pipeline.out / item.name),
    }


def _ended(ended: Ended, batch: Batch) -> dict[str, Any]:
    results: Mapping[str, Mapping[str, Any]] = ended.results
    design, check = results.get("design", {}), results.get("check", {})
    made, measured = results.get("quantize", {}), results.get("verify", {})
    failure = ended.failure
    return {
        **_about(ended.item, batch),
        "steps": [
            {
                "step": s.step,
                "status": s.what,
                "seconds": round(s.seconds, 3),
                "reason": s.reason,
                "log": s.log,
            }
            for s in ended.steps
        ],
        "ok": failure is None,
        "reason": f"{failure.step}: {failure.reason}" if failure else "",
        "tensor_bytes": design.get("tensor_bytes"),
        "bpw": design.get("bpw"),
        "damage": design.get("damage"),
        "ppl_predicted": design.get("ppl"),
        "checked_by": check.get("engine"),
        "file_bytes": made.get("file_bytes"),
        "file_kept": bool(made) and not ended.dropped,
        "ppl": measured.get("ppl"),
        "kld": measured.get("kld"),
        "warnings": made.get("warnings", []),
    }
