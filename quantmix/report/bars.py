"""Bars: memory of every device, damage by role, what a mix is made of; and the map of types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantmix.emit.figures import COMPONENTS
from quantmix.report.colours import by_bits
from quantmix.report.svg import Scale, drawing, hover, tag, text
from quantmix.report.words import say
from quantmix.units import GIB


def memory_charts(devices: Sequence[dict[str, Any]], width: int, prefix: str) -> list[str]:
    """Return one bar per device; RAM that dwarfs the GPUs gets a drawing and a scale of its own."""
    places = list(enumerate(devices))
    gpus = [p for p in places if p[1]["kind"] == "gpu"]
    hosts = [p for p in places if p[1]["kind"] != "gpu"]
    if gpus and hosts and _widest(hosts) > 2 * _widest(gpus):
        return [_memory_chart(gpus, width, prefix), _memory_chart(hosts, width, prefix)]
    return [_memory_chart(places, width, prefix)]


def _memory_chart(places: Sequence[tuple[int, dict[str, Any]]], width: int, prefix: str) -> str:
    """Return one bar per device, its components in order, and its capacity as a line."""
    left, row, top = 52, 34, 4
    devices = [d for _, d in places]
    x = Scale(0.0, _widest(places), left, width - 12)
    height = top + row * len(devices) + 38
    foot = top + row * len(devices) + 2
    parts = []
    for v in x.ticks(8 if width > 500 else 5):
        at = x.at(v)
        parts.append(tag("line", x1=at, x2=at, y1=top, y2=foot, class_="grid"))
        parts.append(text(at, foot + 14, f"{v:g}", "tick", "middle"))
    parts.append(text((left + width - 12) / 2, height - 4, "GiB", "axis", "middle"))
    for k, (i, d) in enumerate(places):
        y = top + row * k + 6
        parts.append(text(left - 8, y + 15, d["name"], "name", "end"))
        before = 0.0
        for key, label, _ in COMPONENTS:
            size = d[key] / GIB
            if not size:
                continue
            a, b = x.at(before), x.at(before + size)
            bar = tag("rect", x=a, y=y, width=max(b - a, 0.4), height=22, class_=key[:-6])
            title = f"{d['name']} {label}: {say(d[key], 'gib')}"
            parts.append(hover(bar, title, f"{prefix}{i}.{key}"))
            before += size
        if d["capacity_bytes"] is not None:
            at = x.at(d["capacity_bytes"] / GIB)
            line = tag("line", x1=at, x2=at, y1=y - 4, y2=y + 26, class_="capacity")
            title = f"{d['name']} capacity: {say(d['capacity_bytes'], 'gib')}"
            parts.append(hover(line, title, f"{prefix}{i}.capacity_bytes"))
    return drawing(width, height, "Memory of every device by component", parts, "chart")


def damage_chart(rows: Sequence[dict[str, Any]], width: int, prefix: str) -> str:
    """Return per role its share of the damage above its share of the bytes."""
    left, row = (150 if width > 500 else 118), 32
    top = max(max(r["damage_share"], r["bytes_share"]) for r in rows)
    x = Scale(0.0, top, left, width - 62)
    parts = []
    for i, r in enumerate(rows):
        y = row * i + 4
        parts.append(text(left - 8, y + 15, r["role"], "name", "end"))
        for share, kind, dy in (("damage_share", "damage", 0), ("bytes_share", "bytes", 12)):
            end = x.at(r[share])
            bar = tag("rect", x=left, y=y + dy, width=max(end - left, 1.0), height=11, class_=kind)
            unit = (
                f"{say(r['damage'], 'nats')} nats"
                if kind == "damage"
                else say(r["bytes"], "gib")
            )  # fmt: skip
            title = f"{r['role']}: {unit}, {say(r[share], 'share')} of the {kind}"
            parts.append(hover(bar, title, f"{prefix}{i}.{share}"))
            if kind == "damage":
                parts.append(text(end + 5, y + 10, say(r[share], "share"), "tick"))
    return drawing(width, row * len(rows) + 4, "Damage and bytes by role", parts, "chart")


def composition_chart(rows: Sequence[dict[str, Any]], width: int, prefix: str) -> str:
    """Return one stacked bar per mix: which types take what share of its bytes."""
    row = 48
    x = Scale(0.0, 1.0, 0, width)
    parts = []
    for i, mix in enumerate(rows):
        y = row * i + 17
        parts.append(text(0, y - 6, mix["name"], "name"))
        before = 0.0
        for j, p in enumerate(mix["parts"]):
            a, b = x.at(before), x.at(before + p["share"])
            fill, ink = by_bits(p["bpw"])
            bar = tag("rect", x=a, y=y, width=max(b - a, 0.4), height=22, fill=fill, class_="cell")
            if b - a > 6.6 * len(p["type"]) + 6:
                bar += tag("text", p["type"], x=(a + b) / 2, y=y + 15, fill=ink,
                           text_anchor="middle", class_="celltext")  # fmt: skip
            title = (
                f"{p['type']}: {say(p['bytes'], 'gib')}, {say(p['share'], 'share')}, "
                f"{say(p['bpw'], 'bpw')} bpw"
            )
            parts.append(hover(bar, title, f"{prefix}{i}.parts.{j}"))
            before += p["share"]
    return drawing(width, row * len(rows) - 8, "Bytes of every mix by type", parts, "chart")


def type_map(runs: Sequence[dict[str, Any]], width: int, prefix: str) -> str:
    """Return roles against layers, coloured by bits per weight, types named where they fit."""
    inside = [(i, r) for i, r in enumerate(runs) if r["first"] is not None]
    outside = [(i, r) for i, r in enumerate(runs) if r["first"] is None]
    roles = list(dict.fromkeys(r["role"] for _, r in inside))
    n_layers = 1 + max((r["last"] for _, r in inside), default=0)
    wide = width > 500
    left, cell = (134 if wide else 104), (22 if wide else 20)
    x = Scale(0.0, float(n_layers), left, width - 2)
    parts = [_cell(runs, i, r, x.at(r["first"]), x.at(r["last"] + 1), cell * roles.index(r["role"]),
                   cell, prefix) for i, r in inside]  # fmt: skip
    parts += [
        text(left - 7, cell * k + cell * 0.68, role, "name", "end") for k, role in enumerate(roles)
    ]
    foot = cell * len(roles)
    for v in x.ticks(12 if wide else 6):
        if v < n_layers and float(v).is_integer():
            at = (x.at(v) + x.at(v + 1)) / 2
            anchor = "middle" if at + 8 < width else "end"
            parts.append(text(min(at, width - 1.0), foot + 14, f"{v:g}", "tick", anchor))
    parts.append(text(left - 7, foot + 14, "layer", "axis", "end"))
    y = foot + 24
    for i, r in outside:
        parts.append(_cell(runs, i, r, left, width - 2.0, y, cell, prefix))
        parts.append(text(left - 7, y + cell * 0.68, r["role"], "name", "end"))
        y += cell
    return drawing(width, y + 2, "Type of every tensor by role and layer", parts, "chart")


def legend(runs: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    """Return (type, bits per weight, colour) of the types of a map, fewest bits first."""
    seen = {r["type"]: min(r["bpw"], 32.0) for r in reversed(runs)}
    return [(t, b, by_bits(b)[0]) for t, b in sorted(seen.items(), key=lambda kv: (kv[1], kv[0]))]


def _cell(
    runs: Sequence[dict[str, Any]],
    i: int,
    r: dict[str, Any],
    a: float,
    b: float,
    y: float,
    cell: int,
    prefix: str,
) -> str:
    fill, ink = by_bits(r["bpw"])
    body = tag("rect", x=a, y=float(y), width=b - a, height=cell, fill=fill, class_="cell")
    if b - a > 6.2 * len(r["type"]) + 4:
        body += tag("text", r["type"], x=(a + b) / 2, y=y + cell * 0.68, fill=ink,
                    text_anchor="middle", class_="celltext")  # fmt: skip
    where = r["role"] if r["first"] is None else (
        f"layer {r['first']}" if r["first"] == r["last"] else f"layers {r['first']}–{r['last']}"
    )  # fmt: skip
    name = where if r["first"] is None else f"{r['role']}, {where}"
    title = f"{name}: {r['type']}, {say(r['bpw'], 'bpw')} bpw, {say(r['bytes'], 'gib')}"
    return hover(body, title, f"{prefix}{i}")


def _widest(places: Sequence[tuple[int, dict[str, Any]]]) -> float:
    return max(max(d["capacity_bytes"] or 0, _used(d)) for _, d in places) / GIB or 1.0


def _used(d: dict[str, Any]) -> int:
    return int(sum(d[key] for key, _, _ in COMPONENTS))
