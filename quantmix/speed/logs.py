"""Rows of published speed logs (columns of data/speed_logs.csv) as loads of the roofline."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final, cast

from quantmix.errors import BadFile, UnknownName
from quantmix.ggml import types
from quantmix.memory.compute import copied_from
from quantmix.rig.cards import Card, find_card
from quantmix.speed.constants import class_of
from quantmix.speed.roofline import Kind, Load, Reader, slow_family

_NEEDED: Final = ("case_id", "mode", "model", "quant_label", "cpu", "gpus", "n_kv", "tg_tps")
_ITEM: Final = re.compile(r"^\s*(?:(\d+)\s*x\s*)?(.+?)\s*$")
_TYPE: Final = re.compile(r"(?:IQ|Q)\d(?:_[A-Z]+|_\d)?(?:_R\d)?|MXFP4|BF16|F16", re.IGNORECASE)


class Unusable(Exception):
    """A row that cannot be turned into a load; the text says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured row: its load and what was measured.

    `rig` names the machine, engine and mode (rows of one rig can be compared); `usable` is the
    table's own verdict (0: pathological placement, two sockets, paging).
    """

    id: str
    case: str
    group: str
    rig: str
    model: str
    mode: str
    n_kv: int
    ubatch: int
    load: Load
    tg_tps: float | None
    pp_tps: float | None
    usable: bool
    uploads_from: int | None


@dataclass(frozen=True, slots=True)
class LogModel:
    """What a speed log needs to know of a model."""

    layers: int
    moe_layers: int
    kind: Kind
    experts: int
    experts_used: int


def read_logs(path: str | Path | None = None) -> tuple[list[Row], list[dict[str, str]]]:
    """Return the rows that can be judged, and the others as `{"id", "why"}`.

    Without a path the published logs beside this module are read (each row names its page).

    Raises:
        BadFile: not such a table.
    """
    path = path or Path(__file__).with_name("logs.csv")
    try:
        table = list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise BadFile(f"{path} cannot be read as speed logs: {err}") from err
    missing = [c for c in _NEEDED if not table or c not in table[0]]
    if missing:
        raise BadFile(f"{path} is not a table of speed logs: no column {missing[0]}")
    rows: list[Row] = []
    skipped: list[dict[str, str]] = []
    for n, raw in enumerate(table):
        name = f"{raw['case_id']}@{raw['n_kv'] or 0}#{n}"
        try:
            rows.append(_row(name, raw))
        except Unusable as why:
            skipped.append({"id": name, "why": str(why)})
    return rows, skipped


def log_model(name: str) -> LogModel | None:
    """Return what is known of a model by its name in a log, else from the catalog, else None."""
    for pattern, known in _log_models():
        if pattern.search(name):
            return known
    from quantmix.models.catalog import find

    try:
        h = find(name.split("(")[0].strip().replace(" ", "-")).hparams
    except UnknownName:
        return None
    kind: Kind = "mla" if h.is_mla else "moe" if h.is_moe else "dense"
    moe = h.n_layer - h.n_dense_lead if h.is_moe else 0
    return LogModel(h.n_layer, moe, kind, h.n_expert, h.n_expert_used)


def parse_cards(text: str) -> list[Card]:
    """Return the cards of `1x RTX 5090 32G; 2x RTX 3090 24G`.

    Raises:
        Unusable: a card that the device table does not have.
    """
    found: list[Card] = []
    for part in (p for p in text.split(";") if p.strip()):
        match = _ITEM.match(part)
        words = match.group(2).split() if match else []
        card = next((c for n in range(len(words), 0, -1) if (c := _card(words[:n]))), None)
        if card is None or card.bandwidth_gbs is None:
            raise Unusable(f"no bandwidth known for {part.strip()!r}")
        found += [card] * int(match.group(1) or 1 if match else 1)
    return found


def label_type(label: str) -> types.GgmlType | None:
    """Return the type that a quant's name speaks of (`UD-Q2_K_XL` → q2_K), None when unclear."""
    table = {t.name.lower(): t for t in types.table("ik").values()}
    for match in _TYPE.finditer(label):
        name = match.group(0).lower()
        if found := table.get(name) or table.get(name.rpartition("_r")[0]):
            return found
    return None


def _row(name: str, raw: dict[str, str]) -> Row:
    model = log_model(raw["model"])
    if model is None:
        raise Unusable(f"model {raw['model']!r} is not known")
    tg, pp = _number(raw, "tg_tps"), _number(raw, "pp_tps")
    if tg is None and pp is None:
        raise Unusable("neither speed was reported")
    mode = raw["mode"]
    qtype = label_type(raw["quant_label"])
    gpus = parse_cards(raw["gpus"]) if mode != "cpu" else []
    load = _load(raw, model, qtype, gpus)
    return Row(
        id=name,
        case=raw["case_id"],
        group=raw.get("group_id") or raw["case_id"],
        rig="|".join(raw.get(c, "") for c in ("engine", "mode", "cpu", "ram_mts", "gpus")),
        model=raw["model"],
        mode=mode,
        n_kv=int(float(raw["n_kv"] or 0)),
        ubatch=int(float(raw.get("ub") or 512)),
        load=load,
        tg_tps=tg,
        pp_tps=pp,
        usable=raw.get("usable_for_fit", "1") != "0",
        uploads_from=_uploads_from(raw, qtype, load),
    )


def _load(
    raw: dict[str, str], model: LogModel, qtype: types.GgmlType | None, cards: list[Card]
) -> Load:
    mode = raw["mode"]
    cpu_bytes = (_number(raw, "est_cpu_active_gb") or 0.0) * 1e9
    gpu_bytes = (_number(raw, "est_gpu_active_gb") or 0.0) * 1e9
    if (mode == "gpu" and not gpu_bytes) or (mode != "gpu" and not cpu_bytes):
        raise Unusable("bytes read per token are not given")
    reached = float(raw["n_kv"] or 0) + (_number(raw, "tg_tokens") or 0.0) / 2
    kv = (_number(raw, "est_kv_kib_per_tok") or 0.0) * 1024 * reached
    shares = _shares(raw.get("ts", ""), cards)
    bits = qtype.bpw if qtype else 4.5
    cpu_params = cpu_bytes * 8 / bits
    readers = tuple(
        Reader(
            gpu_bytes * s,
            kv * s if mode != "cpu" else 0.0,
            card.bandwidth_gbs or 0.0,
            class_of("gpu", card.arch),
            card.efficiency,
            card.int8_tops,
            slow_family(qtype) if mode == "gpu" else "",
        )
        for card, s in zip(cards, shares, strict=True)
    )
    hybrid = mode == "hybrid"
    return Load(
        kind=model.kind,
        gpus=readers,
        cpu=_cpu(raw, cpu_bytes, kv if mode == "cpu" else 0.0) if mode != "gpu" else None,
        gpu_layers=model.layers if mode != "cpu" else 0,
        cpu_layers=model.layers if mode == "cpu" else 0,
        cpu_expert_layers=_cpu_expert_layers(raw, model) if hybrid else 0,
        decode_core_seconds=_decode(qtype, cpu_params) if mode != "gpu" else 0.0,
        cores=int(float(raw.get("cpu_cores") or 16)),
        isa=class_of("isa", raw["cpu"]),
        all_cores=(_number(raw, "threads") or 0) >= (_number(raw, "cpu_cores") or 1e9),
        quantized_cache=raw.get("ctk", "") not in ("", *types.FLOATS),
        active_params=(cpu_bytes + gpu_bytes) * 8 / bits,
        cpu_params=cpu_params if mode != "gpu" else 0.0,
        ram_expert_bytes=(
            cpu_bytes * model.experts / model.experts_used if hybrid and model.experts else 0.0
        ),
        experts=model.experts,
        experts_used=model.experts_used,
    )


def _cpu(raw: dict[str, str], weights: float, kv: float) -> Reader:
    """The host's memory: channels · 8 bytes · MT/s."""
    channels, mts = _number(raw, "ram_channels"), _number(raw, "ram_mts")
    if channels and not mts and "Ryzen 9 7950X" in raw["cpu"]:
        mts = 5200.0  # the rated speed of that CPU
    if channels and not mts and "EPYC 9965" in raw["cpu"]:
        mts = 4800.0  # fits the 275 GB/s that was measured there
    if not channels or not mts:
        raise Unusable("RAM speed is not stated")
    return Reader(weights, kv, channels * 8 * mts / 1000, class_of("cpu", raw["cpu"]))


def _cpu_expert_layers(raw: dict[str, str], model: LogModel) -> int:
    """Layers whose experts the row's own `-ot` rules (`;` or `,` between) put into RAM, least 1."""
    first = model.layers - model.moe_layers if model.moe_layers else 0
    parts = [p.partition("=") for p in re.split("[;,]", raw.get("ot", "")) if p]
    rules = [(pattern, buffer == "CPU") for pattern, _, buffer in parts]
    in_ram = 0
    for layer in range(first, model.layers):
        names = [f"blk.{layer}.ffn_{w}_exps.weight" for w in ("down", "up", "gate")]
        in_ram += any(_first_match(rules, name) for name in names)
    return in_ram or model.moe_layers or model.layers


def _first_match(rules: list[tuple[str, bool]], name: str) -> bool:
    """Whether the first rule that is found in `name` sends it to the CPU."""
    for pattern, to_cpu in rules:
        try:
            if re.search(pattern, name):
                return to_cpu
        except re.error:
            continue
    return False


def _decode(qtype: types.GgmlType | None, params: float) -> float:
    rate = qtype.cpu_gparams if qtype else None
    return params / (rate * 1e9) if rate else 0.0


def _uploads_from(raw: dict[str, str], qtype: types.GgmlType | None, load: Load) -> int | None:
    """Repacked tensors and types without a CUDA kernel are not copied to the GPU."""
    if raw.get("rtr") == "1" or (qtype is not None and not qtype.cuda):
        return None
    date = re.search(r"\d{4}-\d{2}(-\d{2})?", raw.get("author_date", ""))
    engine = "ik" if raw.get("engine", "ik").startswith("ik") else "mainline"
    return copied_from(engine, date.group(0) if date else "", load.experts, load.experts_used)


def _shares(ts: str, cards: list[Card]) -> list[float]:
    given = [float(p) for p in re.split(r"[,/]", ts) if re.fullmatch(r"\s*[\d.]+\s*", p)]
    if len(given) != len(cards) or not sum(given):
        given = [float(c.memory_gib or 1) for c in cards]
    return [g / sum(given) for g in given]


def _card(words: list[str]) -> Card | None:
    try:
        return find_card(" ".join(words), "gpu", "uma")
    except UnknownName:
        return None


def _number(raw: dict[str, str], name: str) -> float | None:
    try:
        return float(raw.get(name) or "")
    except ValueError:
        return None


@cache
def _log_models() -> tuple[tuple[re.Pattern[str], LogModel], ...]:
    text = (files("quantmix.speed") / "log_models.csv").read_text(encoding="utf-8")
    return tuple(
        (
            re.compile(r["pattern"], re.IGNORECASE),
            LogModel(
                int(r["layers"]),
                int(r["moe_layers"]),
                cast(Kind, r["kind"]),
                int(r["experts"]),
                int(r["experts_used"]),
            ),
        )
        for r in csv.DictReader(text.splitlines())
    )
