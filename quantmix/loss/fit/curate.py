"""Curates published measurements: which rows of a large table go into the package.

Kept: wiki.test.raw at context 512, models of the catalog, current quantization code. Dropped:
sweeps on calibration text, rows of code that was replaced, the same file made again (by another
program, with less text for its matrix), models under other names (finetunes, quantization-aware
variants). Nothing is changed in a row but the model name (catalog id), and `imatrix` where the
author found entries missing in his; a row without a mix gets the one that its author published
elsewhere (`mixes.csv`, with the page) or that follows from its name and size (`by_size.csv`), a
preset of llama-quantize gets its types by tensor (`presets.csv`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from quantmix.loss import evidence, shipped
from quantmix.models.catalog import catalog

_HERE: Final = "quantmix.loss.fit"
_Q8: Final = re.compile(r"^Q8_0\b")
COLUMNS: Final = (
    "model", "label", "size_gib", "bpw", "ppl", "ppl_err", "corpus", "n_ctx", "imatrix",
    "base_ppl_bf16_or_q8", "mix", "source",
)  # fmt: skip
_SUPERSEDED: Final = re.compile(r"before\b|\bolder\b|\bOld\b|earlier build|BitClass")
_OLD_CODE: Final = re.compile(r"superseded|2023 quantization code")
_AGAIN: Final = re.compile(r"\(llama\.cpp PR12557\)|imatrix WT (1k|10k|100k|1m) tokens")
PRESET: Final = "ftype:"
# Some chunks of wiki.test.raw: compared with a base on the same chunks, never with other rows.
PART: Final = "wiki.test.raw (part)"
_PLAIN: Final = frozenset({"F16", "BF16", "F32", "FP16"})
# The author's matrix had no entries for attn_k_b and attn_v_b, so these were quantized without one;
# his next files keep them at q8_0 (https://github.com/ikawrakow/ik_llama.cpp/issues/651). He was
# not sure that this alone made the first ones worse.
_MATRIX_LACKED: Final = frozenset({("Kimi-K2-Instruct", "ubergarm v0.1")})


def curate(
    rows: Iterable[Mapping[str, str]],
    *,
    corpus: str = evidence.CORPUS,
    presets: bool = True,
    by_size: bool = True,
) -> list[dict[str, str]]:
    """Return the rows to ship, in the order of the input.

    Args:
        corpus: another text than that of the package, for what is fitted only.
        presets: whether presets of llama-quantize get their types.
        by_size: whether files get the mix that follows from their name and size.
    """
    elsewhere = pages()
    inferred = mixes_by_size() if by_size else {}
    types = preset_mixes() if presets else {}
    out = []
    for row in rows:
        model = evidence.catalog_id(row["model"])
        on_bench = row["corpus"] == corpus and row["n_ctx"] == str(evidence.N_CTX)
        if model and on_bench and _is_current(row):
            mix = row.get("mix") or elsewhere.get((row["model"], row["label"]), "")
            mix = types.get(preset_key(model, preset_of(mix) or "", row["imatrix"]), mix)
            mix = mix or inferred.get((model, row["label"]), "")
            kept = {c: row.get(c, "") for c in COLUMNS}
            imatrix = "no" if _lacked_matrix(row) else kept["imatrix"]
            out.append({**kept, "model": model, "mix": mix, "imatrix": imatrix})
    return out


def _is_current(row: Mapping[str, str]) -> bool:
    old = _SUPERSEDED.search(row["label"]) or _OLD_CODE.search(row.get("notes") or "")
    return not old and not _AGAIN.search(row["label"])


def _lacked_matrix(row: Mapping[str, str]) -> bool:
    return any(row["model"] == m and f"({by})" in row["label"] for m, by in _MATRIX_LACKED)


def more() -> list[dict[str, str]]:
    """Return rows found outside the large table, each with its page."""
    return shipped.rows("more.csv", _HERE)


def preset_of(mix: str) -> str | None:
    """Return the preset that a mix names as a whole, in capitals; None when it is something else.

    A float preset is no mix either.
    """
    name = mix.removeprefix(PRESET).strip().upper()
    whole = mix.startswith(PRESET) and ";" not in mix and name not in _PLAIN
    return name if whole else None


def preset_key(model: str, preset: str, imatrix: str) -> tuple[str, str, str]:
    """Return the key of `presets.csv`: an importance matrix nobody denies counts as used."""
    return model, preset, "no" if imatrix == "no" else "yes"


def preset_mixes() -> dict[tuple[str, str, str], str]:
    """Return the mixes of `presets.csv` by `preset_key`."""
    return {
        (r["model"], r["preset"], r["imatrix"]): r["mix"]
        for r in shipped.rows("presets.csv", _HERE)
    }


def pages() -> dict[tuple[str, str], str]:
    """Return mixes that authors published on another page than the perplexity.

    By (model as published, label); `mixes.csv` names the page of each.
    """
    return _mixes("mixes.csv")


def mixes_by_size() -> dict[tuple[str, str], str]:
    """Return the mixes of `by_size.csv` by (model of the catalog, label)."""
    return _mixes("by_size.csv")


def _mixes(name: str) -> dict[tuple[str, str], str]:
    return {(r["model"], r["label"]): r["mix"] for r in shipped.rows(name, _HERE)}


def base_rows(curated: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return per model the base perplexity that most of its rows name, with a source.

    A model without one gets the median of its whole-file q8_0 measurements: the two differ by
    less than 0.05 %. A model whose experts were trained in 4 bits gets that of the file that holds
    them so, all else at q8_0: the perplexity of a whole q8_0 file, its author says.
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
            exact = catalog()[model].exact_experts
            eight = eight or [r for r in mine if exact and r["mix"] == f"all=q8_0;ffn_exps={exact}"]
            if not eight:
                continue
            source = sorted(eight, key=lambda r: float(r["ppl"]))[len(eight) // 2]
            base = source["ppl"]
        out.append(
            {"model": model, "ppl": base, "corpus": evidence.CORPUS, "n_ctx": str(evidence.N_CTX),
             "source": source["source"]}
        )  # fmt: skip
    return out
