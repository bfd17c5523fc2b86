"""Published engine logs as cases: what was run, and what each device then held.

A logs table has one row per (case, device) with the columns of `REQUIRED`; sizes in MiB, empty =
not stated. Everything that a case does not state but a prediction needs is named, so that nothing
is judged on a guess.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Final

from quantmix.errors import BadFile
from quantmix.memory.kv import MAINLINE_MLA
from quantmix.memory.logmodels import find_model
from quantmix.memory.settings import Settings
from quantmix.models.model import Layout, Model
from quantmix.units import MIB

REQUIRED: Final = (
    *("case_id", "source_url", "engine", "engine_date", "model", "arch", "file_quant_label"),
    *("model_file_gib", "n_ctx", "n_batch", "n_ubatch", "mla", "fa", "amb_mib", "fmoe", "rtr"),
    *("ctk", "ctv", "ngl", "tensor_split", "ot_rules", "other_flags", "device"),
    *("weights_mib", "kv_mib", "compute_mib", "output_mib", "notes"),
)
_KV_LOG: Final = re.compile(r"KV log: ([\d.,]+) MiB")
_TYPES: Final = re.compile(r"types: ([\w=,]+)")
_COPIES: Final = re.compile(r"n_copies=(\d+)")
_OFFLOADED: Final = re.compile(r"offloaded (\d+)/(\d+)")
_SPLITS: Final = re.compile(r"graph splits=(\d+)")
_SLOTS: Final = re.compile(r"-np (\d+)")
IK_FA_DEFAULT: Final = "2025-11-05"  # flash attention on unless told otherwise


@dataclass(frozen=True, slots=True)
class LoggedDevice:
    """What one device held according to the log, in MiB; None where the log is silent."""

    name: str
    weights: float | None
    kv: float | None
    compute: float | None
    output: float | None

    @property
    def is_gpu(self) -> bool:
        """Whether it is a graphics card and not a host buffer."""
        return re.fullmatch(r"(CUDA|Vulkan|ROCm)\d+", self.name) is not None

    @property
    def index(self) -> int:
        """Number of the card."""
        return int(re.sub(r"\D", "", self.name) or 0)


@dataclass(frozen=True, slots=True)
class LogCase:
    """One run.

    Attributes:
        settings: as stated; defaults of the engine where a flag was not given.
        unstated: what the post does not say although memory depends on it.
        types: tensors by type as the loader listed them. file_gib: size of the file.
        kv_total: MiB of the whole cache. copies: graph-input copies that the log shows.
        offloaded: layers on GPUs and of how many, None when not shown.
    """

    id: str
    url: str
    model_text: str
    model: Model | None
    settings: Settings
    unstated: frozenset[str]
    devices: tuple[LoggedDevice, ...]
    quant_label: str
    file_gib: float | None
    types: dict[str, int]
    kv_total: float | None
    copies: int
    offloaded: tuple[int, int] | None
    graph_splits: int | None
    tensor_split: tuple[float, ...]
    split_mode: str
    ot_rules: tuple[str, ...]
    flags: str
    fused: bool
    rtr: bool
    notes: str = field(default="", repr=False)

    @property
    def gpus(self) -> tuple[LoggedDevice, ...]:
        """Graphics cards in device order."""
        return tuple(sorted((d for d in self.devices if d.is_gpu), key=lambda d: d.index))


def read_logs(path: str | Path | None = None) -> tuple[LogCase, ...]:
    """Return the cases of a logs table in file order; without a path, those shipped here.

    The shipped `logs.csv` holds facts of public posts: one link per case, no text of theirs.

    Raises:
        BadFile: missing, not a CSV, or without a needed column.
    """
    if path is None:
        path = str(files("quantmix.memory") / "logs.csv")
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise BadFile(f"logs {path} cannot be read: {err}") from err
    return parse_rows(rows, str(path))


def parse_rows(rows: Iterable[dict[str, str]], name: str = "logs") -> tuple[LogCase, ...]:
    """Return the cases of table rows, in order of first appearance.

    Raises:
        BadFile: a needed column is missing, or a number is none.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        missing = [c for c in REQUIRED if row.get(c) is None]
        if missing:
            raise BadFile(f"{name}: column {missing[0]!r} is missing")
        groups.setdefault(row["case_id"], []).append(row)
    try:
        return tuple(_case(case_id, found) for case_id, found in groups.items())
    except ValueError as err:
        raise BadFile(f"{name}: {err}") from err


def _case(case_id: str, rows: list[dict[str, str]]) -> LogCase:
    head, notes = rows[0], "; ".join(r["notes"] for r in rows)
    kv_log = _KV_LOG.search(notes)
    devices = tuple(_device(r) for r in rows)
    stated = [d.kv for d in devices if d.kv is not None]
    types = _TYPES.search(notes)
    model = find_model(head["model"], head["arch"], _layout(head["model"], notes, head))
    settings, unstated = _settings(rows, notes, model)
    copies = _COPIES.search(notes)
    offloaded, splits = _OFFLOADED.search(notes), _SPLITS.search(notes)
    return LogCase(
        id=case_id,
        url=head["source_url"],
        model_text=head["model"],
        model=model,
        settings=settings,
        unstated=unstated,
        devices=devices,
        quant_label=head["file_quant_label"],
        file_gib=_gib(head["model_file_gib"]),
        types=_counts(types.group(1)) if types else {},
        kv_total=_kv_total(stated, _mib(kv_log.group(1)) if kv_log else None),
        copies=int(copies.group(1)) if copies else 1,
        offloaded=(int(offloaded.group(1)), int(offloaded.group(2))) if offloaded else None,
        graph_splits=int(splits.group(1)) if splits else None,
        tensor_split=_split(head["tensor_split"]),
        split_mode=head.get("split_mode", ""),
        ot_rules=_rules(head["ot_rules"]),
        flags=head["other_flags"] + " " + notes,
        fused=head["fmoe"] != "0" or head["engine_date"] >= IK_FA_DEFAULT,
        rtr=head["rtr"] == "1",
        notes=notes,
    )


def _settings(
    rows: list[dict[str, str]], notes: str, model: Model | None
) -> tuple[Settings, frozenset[str]]:
    """Launch settings of a case, and what memory needs but its first row does not state."""
    row = rows[0]
    unstated = {c for c in ("n_ctx", "n_ubatch") if not row[c]}
    is_mla = model is not None and model.hparams.is_mla
    mla = row["mla"]
    if is_mla and not mla and row["engine"] == "ik":
        unstated.add("mla")
        mla = "3" if "c^KV" in notes else "0"
    fa = row["fa"]
    if not fa:
        unstated.add("fa")
        fa = "1" if row["engine_date"] >= IK_FA_DEFAULT and "kv^T (" not in notes else "0"
    slots = _SLOTS.search(row["other_flags"])
    settings = Settings(
        engine="ik" if row["engine"] == "ik" else "mainline",
        build=row["engine_date"],
        ctx=int(float(row["n_ctx"] or 0)),
        ctk=row["ctk"] or _logged_type(notes, r"(?:K|c\^KV)"),
        ctv=row["ctv"] or _logged_type(notes, "V"),
        ubatch=int(float(row["n_ubatch"] or 512)),
        batch=int(float(row["n_batch"] or 2048)),
        parallel=int(slots.group(1)) if slots else _sequences(model, rows),
        mla=int(float(mla or 0)),
        amb=int(float(row["amb_mib"] or 0)),
        fa=fa == "1",
        nkvo="-nkvo" in row["other_flags"],
    )
    return settings, frozenset(unstated)


def _layout(text: str, notes: str, row: dict[str, str]) -> Layout:
    """MLA tensors of the file, from what the engine said it computed at load."""
    if "attn_kv_b[" in notes:
        return "split"
    if "attn_v_b[" in notes:
        return "legacy"
    # Mainline without MLA support ran only files with attn_kv_b.
    if row["engine"] == "mainline" and row["engine_date"] < MAINLINE_MLA:
        return "legacy"
    return "ik"


def _sequences(model: Model | None, rows: list[dict[str, str]]) -> int:
    """Sequences of a run of a hybrid: its perplexity tool keeps a state, and a row of logits, each.

    Only recurrent state depends on them, so other models count one.
    """
    if model is None or not model.hparams.ssm_d_state:
        return 1
    outputs = [_mib(r["output_mib"]) for r in rows if r["output_mib"]]
    one = 4 * model.hparams.n_vocab / MIB
    return max(1, round(max(outputs) / one)) if outputs else 1


def _logged_type(notes: str, which: str) -> str:
    """Cache type that the engine logged for K or V, f16 when the post does not show it."""
    match = re.search(rf"\b{which} \((\w+)\):", notes)
    return match.group(1) if match else "f16"


def _kv_total(per_device: list[float], logged: float | None) -> float | None:
    """MiB of the whole cache: the sum over devices, unless the post leaves some of them out."""
    total = sum(per_device)
    if logged is not None and total < 0.98 * logged:
        return logged
    return total if per_device else None


def _device(row: dict[str, str]) -> LoggedDevice:
    def value(column: str) -> float | None:
        return _mib(row[column]) if row[column] else None

    return LoggedDevice(
        name=row["device"],
        weights=value("weights_mib"),
        kv=value("kv_mib"),
        compute=value("compute_mib"),
        output=value("output_mib"),
    )


def _mib(text: str) -> float:
    """A number of MiB; logs from some places write a decimal comma."""
    return float(text.replace(",", "."))


def _gib(text: str) -> float | None:
    match = re.fullmatch(r"\s*([\d.]+)\s*(MiB)?\s*", text)
    if match is None:
        return None
    return float(match.group(1)) / (1024 if match.group(2) else 1)


def _counts(text: str) -> dict[str, int]:
    return {k: int(n) for k, n in (item.split("=") for item in text.strip(",").split(","))}


def _split(text: str) -> tuple[float, ...]:
    """Shares of `-ts`; a list that is none (a typo in the post) counts as not given."""
    parts = [x.strip() for x in re.split(r"[,/;]", text) if x.strip()]
    if not all(re.fullmatch(r"\d*\.?\d+", x) for x in parts):
        return ()
    return tuple(float(x) for x in parts)


def _rules(text: str) -> tuple[str, ...]:
    """`-ot` rules in command order; `|` joins rules in the oldest rows, `;` in the others."""
    parts = re.split(r"[;,](?=[^;,=]*=)", text) if text else []
    return tuple(p for p in parts if "=" in p)
