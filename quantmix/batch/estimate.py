"""How long and how large: estimates for a plan, from what this batch measured, else from a table.

`costs.csv` holds seconds per unit of work on two cores that had other work too, so they are rather
high; `tests/bench/bench_batch.py --costs` measures them again. What has run in the same folder
tells more and is used where it is.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

from quantmix.batch.items import Item, Judged
from quantmix.batch.pipeline import STEPS, Step
from quantmix.batch.state import State

_BYTES_PER_TOKEN: Final = 4.0
_SOURCE_BYTES: Final = 2.0  # per weight: no mix is larger than its bf16 source


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of all steps that will run, and the bytes of the files that they will write."""

    seconds: float
    file_bytes: int


@cache
def table() -> dict[str, float]:
    """Return step → seconds per unit."""
    text = files("quantmix.batch").joinpath("costs.csv").read_text(encoding="utf-8")
    return {
        row["step"]: float(row["seconds_per_unit"]) for row in csv.DictReader(text.splitlines())
    }


def units(item: Item, step: Step, folder: Path) -> float:
    """Return the work of a step: tensors, weights to quantize, or weights × tokens to measure."""
    if item.facts is None:
        return 0.0
    if step == "quantize":
        return float(item.facts.n_elements)
    if step == "verify":
        passes = 2 if item.base else 1
        return float(item.facts.n_elements) * _tokens(item, folder) * passes
    return float(item.facts.n_tensors)


def _tokens(item: Item, folder: Path) -> float:
    from quantmix.texts import text

    corpus = folder / item.job.corpus if item.job.corpus else text("test")
    try:
        tokens = corpus.stat().st_size / _BYTES_PER_TOKEN
    except OSError:
        return 0.0
    if item.job.chunks is not None:
        tokens = min(tokens, item.job.chunks * item.job.verify_ctx)
    return tokens


def pace(items: Sequence[Item], state: State, folder: Path) -> dict[str, float]:
    """Return step → seconds per unit, from finished steps of these items where there are any."""
    rates = dict(table())
    by_name = {item.name: item for item in items}
    for step in STEPS:
        known = [(s, units(by_name[r], step, folder)) for s, r in state.pace(step) if r in by_name]
        work = sum(u for _, u in known)
        if work > 0:
            rates[step] = sum(s for s, _ in known) / work
    return rates


def estimate(
    item: Item, judged: Sequence[Judged], rates: dict[str, float], folder: Path
) -> Estimate:
    """Return what the due steps of an item will take; those that may be spared are counted."""
    due = [j for j in judged if j.verdict in ("run", "later")]
    seconds = sum(rates[j.step] * units(item, j.step, folder) for j in due)
    writes = any(j.step == "quantize" for j in due)
    return Estimate(seconds, _file_bytes(item, judged) if writes else 0)


def _file_bytes(item: Item, judged: Sequence[Judged]) -> int:
    """Return the bytes of the quantized file: as designed, else at most what the budget allows."""
    for j in judged:
        if j.step == "design" and j.verdict == "done" and j.last is not None:
            return int(j.last.result["file_bytes"])
    if item.facts is None:
        return 0
    from quantmix.request import budget_of

    budget, _ = budget_of(item.request, is_mla=item.facts.is_mla)
    most = _SOURCE_BYTES * item.facts.n_elements
    if budget.bpw is not None:
        most = min(most, budget.bpw * item.facts.n_elements / 8)
    elif budget.file_bytes is not None:
        most = min(most, budget.file_bytes)
    elif budget.rig is not None:
        room = [d.capacity_bytes for d in budget.rig.devices if d.capacity_bytes is not None]
        most = min(most, float(sum(room)))
    return int(most)
