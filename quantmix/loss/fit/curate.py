"""Curates published measurements: which rows of a large table go into the package.

Kept: wiki.test.raw at context 512, models of the catalog, current quantization code. Dropped:
sweeps on calibration text, rows of code that was replaced, models under other names (finetunes,
quantization-aware variants). Nothing is changed in a row but the model name (catalog id); a row
without a mix gets the one that its author published elsewhere (`mixes.csv`, with the page).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Final

from quantmix.loss import evidence

_Q8: Final = re.compile(r"^Q8_0\b")
COLUMNS: Final = (
    "model", "label", "size_gib", "bpw", "ppl", "ppl_err", "corpus", "n_ctx", "imatrix",
    "base_ppl_bf16_or_q8", "mix", "source",
)  # fmt: skip
_SUPERSEDED: Final = re.compile(r"before\b|\bolder\b|\bOld\b|earlier build|BitClass")


def curate(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the rows to ship, in the order of the input."""
    elsewhere = published_mixes()
    out = []
    for row in rows:
        model = evidence.catalog_id(row["model"])
        on_bench = row["corpus"] == evidence.CORPUS and row["n_ctx"] == str(evidence.N_CTX)
        if model and on_bench and not _SUPERSEDED.search(row["label"]):
            mix = row.get("mix") or elsewhere.get((row["model"], row["label"]), "")
            kept = {c: row.get(c, "") for c in COLUMNS}
            out.append({**kept, "model": model, "mix": mix})
    return out


def published_mixes() -> dict[tuple[str, str], str]:
    """Return mixes that authors published on another page than the perplexity.

    By (model as published, label); `mixes.csv` names the page of each.
    """
    text = (files("quantmix.loss.fit") / "mixes.csv").read_text(encoding="utf-8")
    return {(r["model"], r["label"]): r["mix"] for r in csv.DictReader(text.splitlines())}


def base_rows(curated: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return per model the base perplexity that most of its rows name, with a source.

    A model without one gets the median of its whole-file q8_0 measurements: the two differ by
    less than 0.05 %.
    """
    out = []
    for model in dict.fromkeys(row["model"] for row in curated):
        mine = [row for row in curated if row["model"] == model]
        named = [row["base_ppl_bf16_or_q8"] for row in mine if row["base_ppl_bf16_or_q8"]]
        if named:
            base = max(sorted(set(named)), key=named.count)
            near = [r for r in mine if abs(float(r["ppl"]) / float(base) - 1.0) < 1e-4]
            source = (near or [r for r in mine if r["base_ppl_bf16_or_q8"] == base])[0]
        else:
            eight = [r for r in mine if _Q8.search(r["label"]) and 8.4 < float(r["bpw"] or 0) < 8.6]
            if not eight:
                continue
            source = sorted(eight, key=lambda r: float(r["ppl"]))[len(eight) // 2]
            base = source["ppl"]
        out.append(
            {"model": model, "ppl": base, "corpus": evidence.CORPUS, "n_ctx": str(evidence.N_CTX),
             "source": source["source"]}
        )  # fmt: skip
    return out
