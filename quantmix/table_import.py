"""Per-tensor KLD tables of other tools as a measurements file for `design --measurements`.

The tables have a row per type and a column per tensor: `QTYPE,blk.0.attn_k.weight,…`; a cell is the
KLD of the whole model with only that tensor at that type, `404` or empty an unmeasured one (the
form of the GGUF Tool Suite's `kld_results.csv`). Runs of the same bench share a noise floor, the
least cell of a row, which is taken off. A role's own KLD is the sum over its tensors, scaled up
for cells that are missing: single tensors add up while damage is small. Rows of ternary types are
left out: they wreck ordinary weights (thirty times the KLD of iq1_kt) and rank nothing.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections import defaultdict
from pathlib import Path

from quantmix.errors import BadFile, UsageError
from quantmix.ggml import types as ggml
from quantmix.measurements import TABLE, Measurements, Probe
from quantmix.models.model import Model, Tensor

_UNMEASURED = 404.0


def import_table(file: str | Path, model: Model) -> Measurements:
    """Return the measurements of a per-tensor KLD table for `model`.

    Raises:
        BadFile: it cannot be read, is no such table, or a cell is no KLD.
        UsageError: no column is a quantizable tensor of the model.
    """
    path = Path(file)
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise BadFile(f"{path} cannot be read as a table: {err}") from err
    if not rows or "QTYPE" not in rows[0]:
        raise BadFile(f"{path} is no table of KLD per tensor: its first column must be QTYPE")
    free = {t.name: t for t in model.tensors if t.quantizable}
    known = [c for c in rows[0] if c in free]
    if not known:
        raise UsageError(f"{path} names no tensor of {model.id}: say the right --model")
    probes: list[Probe] = []
    for row in rows:
        qtype = ggml.get(row["QTYPE"] or "", "ik")
        if qtype.family == "ternary":
            continue
        cells = {c: _kld(path, c, row[c] or "") for c in known}
        measured = {c: v for c, v in cells.items() if v is not None}
        if not measured:
            continue
        floor = max(0.0, min(measured.values()))
        probes += _probes(model, free, measured, floor, qtype.name)
    if not probes:
        raise BadFile(f"{path} holds no measured cell of a type for ordinary weights")
    digest = TABLE + hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    return Measurements(
        model=digest,
        model_name=model.id,
        base=digest,
        engine="table of another tool",
        corpus="",
        imatrix=None,
        n_ctx=512,
        chunks=0,
        tokens=0,
        ppl_base=0.0,
        noise_floor=0.0,  # taken off already
        probes=tuple(probes),
    )


def _probes(
    model: Model, free: dict[str, Tensor], measured: dict[str, float], floor: float, qtype: str
) -> list[Probe]:
    """Return the tensor probes of one row, then one probe for each role."""
    probes = []
    sums: dict[str, float] = defaultdict(float)
    seen: dict[str, int] = defaultdict(int)
    whole: dict[str, int] = defaultdict(int)
    for t in free.values():
        whole[t.role] += t.n_elements
    for name, value in measured.items():
        t = free[name]
        above = max(value - floor, 0.0)
        layers = () if t.layer is None else (t.layer,)
        probes.append(_probe("tensor", t.role, layers, qtype, above, floor, t.n_elements))
        sums[t.role] += above
        seen[t.role] += t.n_elements
    for role, value in sums.items():
        scaled = value * whole[role] / seen[role]
        probes.append(_probe("role", role, (), qtype, scaled, floor, whole[role]))
    return probes


def _probe(
    scope: str, role: str, layers: tuple[int, ...], qtype: str, kld: float, err: float, n: int
) -> Probe:
    return Probe(
        scope=scope,  # type: ignore[arg-type]
        role=role,
        layers=layers,
        type=qtype,
        kld=kld,
        kld_err=max(err, 0.1 * kld),
        ln_ratio=0.9 * kld,
        ln_ratio_err=0.2 * kld,
        err=0.0,
        n_elements=n,
        seconds=0.0,
    )


def _kld(path: Path, column: str, text: str) -> float | None:
    """Read one cell; None when it was not measured."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value == _UNMEASURED:
        return None
    if not math.isfinite(value) or value < 0:
        raise BadFile(f"{path}: the cell of {column} is {text!r}, no KLD in nats")
    return value
