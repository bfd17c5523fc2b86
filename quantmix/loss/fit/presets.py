"""`python -m quantmix.loss.fit.presets --measurements CSV`: what stock presets are, by tensor.

Published ladders name a preset of llama-quantize (`ftype:Q4_K_M`). Its types are asked of the real
mainline engine, by a dry run on a ghost of the model, and written to `presets.csv` as mixes (the
grammar of `quantmix.loss.mixes`), so that a refit needs no engine. Some presets ask whether there
is an importance matrix. Wherever a size was published it must agree within 1.5 % (and what a
vocabulary takes), or the preset is left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from quantmix.engine.presets import types_of
from quantmix.ggml.types import get
from quantmix.loss import evidence
from quantmix.loss.fit import command, curate
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.units import GIB

COLUMNS: Final = ("model", "preset", "imatrix", "mix")
# The text of the package, and what is read for the fit only.
CORPORA: Final = (evidence.CORPUS, curate.PART)
_SIZE_AGREES: Final = 0.015
_VOCABULARY_BYTES: Final = 10 << 20


def as_mix(model: Model, types: Mapping[str, str]) -> str:
    """Return types by tensor as a mix: per role its commonest type, and the layers of others."""
    by_role: dict[str, list[tuple[int, str]]] = {}
    for tensor in model.tensors:
        if tensor.name in types:
            layer = -1 if tensor.layer is None else tensor.layer
            by_role.setdefault(tensor.role, []).append((layer, types[tensor.name]))
    items = []
    for role, members in by_role.items():
        counts = Counter(qtype for _, qtype in members)
        usual = max(sorted(counts), key=lambda q: counts[q])
        parts = [
            f"{qtype}[{_ranges(layer for layer, q in members if q == qtype)}]"
            for qtype in sorted(counts)
            if qtype != usual
        ]
        items.append(f"{role}={'+'.join([*parts, usual])}")
    return ";".join(items)


def _bytes(model: Model, types: Mapping[str, str]) -> int:
    """Return the bytes of all tensors, those without a type as f32."""
    total = 0
    for tensor in model.tensors:
        qtype = get(types.get(tensor.name, "f32"), "mainline")
        total += qtype.row_bytes(tensor.shape[0]) * (tensor.n_elements // tensor.shape[0])
    return total


def _ranges(layers: Iterable[int]) -> str:
    """Return `0-3,7` for 0, 1, 2, 3, 7."""
    out: list[list[int]] = []
    for layer in sorted(layers):
        if out and layer == out[-1][1] + 1:
            out[-1][1] = layer
        else:
            out.append([layer, layer])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in out)


def main() -> None:
    """Write `presets.csv` for every preset among the measurements of catalog models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, required=True, help="CSV of measurements")
    measured = [*evidence.raw_rows(parser.parse_args().measurements), *curate.more()]
    rows = [row for c in CORPORA for row in curate.curate(measured, corpus=c, presets=False)]
    out: dict[tuple[str, str, str], str] = {}
    for row in rows:
        preset = curate.preset_of(row["mix"])
        if preset is None:
            continue
        key = curate.preset_key(row["model"], preset, row["imatrix"])
        if key in out:
            continue
        model = load_model(row["model"])
        types = types_of(model, preset, "mainline", imatrix=key[2] == "yes")
        off = _off(model, types, row["size_gib"])
        if off:
            print(f"{' '.join(key)}: {off:+.1%} of the size published", file=sys.stderr)
        else:
            out[key] = as_mix(model, types)
    file = Path(__file__).with_name("presets.csv")
    with file.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*key, mix) for key, mix in sorted(out.items()))


def _off(model: Model, types: Mapping[str, str], size_gib: str) -> float:
    """Return how far the published size of the file is from ours; 0 when it agrees or is none."""
    if not size_gib:
        return 0.0
    published, ours = float(size_gib) * GIB, _bytes(model, types)
    slack = _SIZE_AGREES * published
    agrees = -slack <= published - ours <= max(slack, _VOCABULARY_BYTES)
    return 0.0 if agrees else ours / published - 1.0


if __name__ == "__main__":
    command(main)
