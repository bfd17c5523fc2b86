"""The chart that people ask for: perplexity (and KLD) against size, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from quantmix.report.svg import Labels, Scale, drawing, hover, tag, text
from quantmix.report.words import say
from quantmix.units import GIB, MIB

_LEAST_RISE = 1e-3  # foot of the axis, lower only when everything is: below is noise
_LEAST_KLD = 1e-5


@dataclass(frozen=True, slots=True)
class Spot:
    """One mark: size, height above zero (rise or nats), number beside it, hover text, JSON key."""

    n_bytes: int
    value: float
    kind: str
    title: str
    key: str
    tag: str = ""
    error: float | None = None


def rise_spots(section: dict[str, Any], prefix: str) -> list[Spot]:
    """Return all marks of the perplexity chart; what was measured here lies on top."""
    spots = []
    frontier = section["frontier"]
    for i, p in enumerate(frontier["published"] if frontier else ()):
        if p["ln_ppl_ratio"] is not None:
            words = (
                say(p["tensor_bytes"], "gib"),
                say(p["ppl"], "ppl"),
                say(p["ln_ppl_ratio"], "rise"),
            )
            title = f"{p['label']}: {words[0]}, PPL {words[1]} ({words[2]}), published"
            spots.append(
                Spot(p["tensor_bytes"], p["ln_ppl_ratio"], "published", title,
                     f"{prefix}frontier.published.{i}", str(i + 1))
            )  # fmt: skip
    for i, r in enumerate(section["recipes"]):
        q = r["quality"]
        ppl = f"PPL {say(q['ppl'], 'ppl')}, " if q["ppl"] is not None else ""
        title = (
            f"{r['name']}: {say(r['size']['tensor_bytes'], 'gib')}, {ppl}"
            f"{say(q['ln_ppl_ratio'], 'rise')}, predicted"
        )
        spots.append(Spot(r["size"]["tensor_bytes"], q["ln_ppl_ratio"], "recipe", title,
                          f"{prefix}recipes.{i}", _tag(section, r)))  # fmt: skip
    for i, m in enumerate(section["measured"]):
        if m["ln_ppl_ratio"] is not None:
            title = (
                f"{m['label']}: {say(m['tensor_bytes'], 'gib')}, PPL {say(m['ppl'], 'ppl')} "
                f"({say(m['ln_ppl_ratio'], 'rise')}), measured"
            )
            kind = "ours" if m["ours"] else "stock"
            spots.append(Spot(m["tensor_bytes"], m["ln_ppl_ratio"], kind, title,
                              f"{prefix}measured.{i}", error=m["ln_ppl_ratio_err"]))  # fmt: skip
    return spots


def rise_chart(section: dict[str, Any], width: int, height: int, prefix: str = "section.") -> str:
    """Return the rise of perplexity over the unquantized model against size, both logarithmic."""
    frontier = section["frontier"]
    points = frontier["points"] if frontier else []
    spots = rise_spots(section, prefix)
    base = frontier["ppl_base"] if frontier else None
    values = [s.value for s in spots] + [p["ln_ppl_ratio"] for p in points]
    chart = _Chart.around(
        width, height, [s.n_bytes for s in spots] + [p["tensor_bytes"] for p in points],
        [math.expm1(v) for v in values], right=52 if base else 12,
    )  # fmt: skip
    parts = chart.axes("rise of PPL", lambda v: f"{100 * v:g} %")
    if base:
        end = chart.x.end + 6
        parts += [
            text(end, chart.y.at(v) + 4, f"{base * (1 + v):.3f}", "tick")
            for v in chart.y.ticks(chart.most_y)
        ]
        parts.append(text(width, 11, "PPL", "axis", "end"))
    if points:
        parts += _band(chart, points)
        parts.append(_knee(chart, frontier, prefix))
        parts += _dots(chart, points, f"{prefix}frontier.points.")
    line = [(p["tensor_bytes"], math.expm1(p["ln_ppl_ratio"])) for p in points]
    parts += _marks(chart, [(s, math.expm1(s.value)) for s in spots], line)
    return drawing(width, height, "Predicted and measured perplexity against size", parts, "chart")


def kld_chart(section: dict[str, Any], width: int, height: int, prefix: str = "section.") -> str:
    """Return measured KLD against size with the predicted damage as a line, both logarithmic."""
    frontier = section["frontier"]
    points = frontier["points"] if frontier else []
    spots = []
    for i, r in enumerate(section["recipes"]):
        q = r["quality"]
        title = f"{r['name']}: damage {say(q['damage'], 'nats')}, predicted"
        spots.append(Spot(r["size"]["tensor_bytes"], q["damage"], "recipe", title,
                          f"{prefix}recipes.{i}", _tag(section, r)))  # fmt: skip
    for i, m in enumerate(section["measured"]):
        if m["kld"] is not None and m["kld"] > 0:
            title = f"{m['label']}: {say(m['tensor_bytes'], 'gib')}, KLD {say(m['kld'], 'nats')}"
            kind = "ours" if m["ours"] else "stock"
            spots.append(
                Spot(m["tensor_bytes"], m["kld"], kind, title, f"{prefix}measured.{i}")
            )  # fmt: skip
    sizes = [s.n_bytes for s in spots] + [p["tensor_bytes"] for p in points]
    heights = [s.value for s in spots] + [p["damage"] for p in points]
    chart = _Chart.around(width, height, sizes, heights, right=12, least=_LEAST_KLD)
    parts = chart.axes("nats", lambda v: f"{v:g}")
    shown = [p for p in points if p["damage"] > chart.y.low]
    line = [(chart.px(p["tensor_bytes"]), chart.y.at(p["damage"])) for p in shown]
    if line:
        parts.append(tag("path", d=_path(line), class_="frontier"))
    curve = [(p["tensor_bytes"], p["damage"]) for p in points]
    parts += _marks(chart, [(s, s.value) for s in spots], curve)
    return drawing(width, height, "Measured KLD and predicted damage against size", parts, "chart")


def _tag(section: dict[str, Any], recipe: dict[str, Any]) -> str:
    """What stands beside the mark of a recipe."""
    if len(section["recipes"]) == 1:
        return "this recipe"
    budget = str(recipe["budget"])
    return str(recipe["name"]) if not budget or budget.isdigit() else budget


def residual_chart(
    rows: Sequence[dict[str, Any]], width: int, height: int, prefix: str = "section."
) -> str:
    """Return measured over predicted perplexity, mix by mix in order of bits per weight.

    The height is linear near zero and logarithmic beyond 0.3 %, so that tight and wide intervals
    can be seen side by side.
    """
    values = [r[k] for r in rows for k in ("residual", "residual_low", "residual_high")]
    top = min(max(abs(math.expm1(v)) for v in values), 3.0)
    left, right, bottom = 52, width - 8, height - 34
    x = Scale(-0.7, len(rows) - 0.3, left, right)
    y = Scale(-_squeeze(top), _squeeze(top), bottom, 20)
    parts = [text(0, 11, "measured against predicted PPL", "axis")]
    for v in [0.0, *(s * t for t in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0) for s in (1, -1))]:
        if abs(v) <= top:
            at = y.at(_squeeze(v))
            kind = "grid" if v else "zero"
            parts.append(tag("line", x1=left, x2=right, y1=at, y2=at, class_=kind))
            parts.append(text(left - 6, at + 4, f"{100 * v:+g} %" if v else "0", "tick", "end"))
    step = max(1, math.ceil(len(rows) * 36 / (right - left)))
    for i in range(0, len(rows), step):
        parts.append(text(x.at(i), bottom + 16, f"{rows[i]['bpw']:.2f}", "tick", "middle"))
    parts.append(text((left + right) / 2, height - 3, "bits per weight", "axis", "middle"))
    for i, r in enumerate(rows):
        at = x.at(i)
        lo, hi, dot = (
            y.at(_squeeze(math.expm1(r[k]))) for k in ("residual_low", "residual_high", "residual")
        )
        kind = ("ours" if r["ours"] else "published") + ("" if r["holds"] else " outside")
        title = (
            f"{r['label']}: measured {say(r['measured'], 'ppl')}, predicted "
            f"{say(r['predicted'], 'ppl')} [{say(r['low'], 'ppl')}, {say(r['high'], 'ppl')}]"
        )
        body = tag("rect", x=at - 4, y=hi, width=8, height=max(lo - hi, 1.0), rx=4, class_="span")
        body += tag("circle", cx=at, cy=dot, r=4, class_=kind)
        parts.append(hover(body, title, f"{prefix}residuals.{i}"))
    return drawing(width, height, "Measured against predicted perplexity", parts, "chart")


def _squeeze(ratio: float) -> float:
    return math.asinh(ratio / 0.003)


@dataclass(frozen=True, slots=True)
class _Chart:
    """Axes of a chart of something against size, in GiB or, below one, in MiB."""

    width: int
    height: int
    x: Scale
    y: Scale
    unit: int

    @classmethod
    def around(
        cls,
        width: int,
        height: int,
        sizes: Iterable[int],
        values: Iterable[float],
        right: int,
        least: float = _LEAST_RISE,
    ) -> _Chart:
        all_sizes = list(sizes) or [GIB]
        unit = GIB if max(all_sizes) >= GIB else MIB
        tops = [v for v in values if v > 0] or [0.01]
        low = max(min(tops) / 1.25, min(least, max(tops) / 30))
        left, bottom = (52, 42) if width > 500 else (44, 40)
        return cls(
            width,
            height,
            Scale(
                min(all_sizes) / unit / 1.03,
                max(all_sizes) / unit * 1.03,
                left,
                width - right,
                True,
            ),
            Scale(low, max(max(tops) * 1.25, 2 * low), height - bottom, 20, log=True),
            unit,
        )

    def px(self, n_bytes: float) -> float:
        """Return the pixel of a size."""
        return self.x.at(n_bytes / self.unit)

    @property
    def most_y(self) -> int:
        return 9 if self.height > 300 else 7

    def axes(self, label: str, write: Any) -> list[str]:
        """Grid, ticks, names of the axes."""
        x, y = self.x, self.y
        parts = []
        for v in y.ticks(self.most_y):
            parts.append(tag("line", x1=x.start, x2=x.end, y1=y.at(v), y2=y.at(v), class_="grid"))
            parts.append(text(x.start - 6, y.at(v) + 4, write(v), "tick", "end"))
        for v in x.ticks(12 if self.width > 500 else 6):
            at = x.at(v)
            parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="axisline"))
            parts.append(text(at, y.start + 17, f"{v:g}", "tick", "middle"))
        parts.append(
            tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axisline")
        )  # fmt: skip
        parts.append(text(0, 11, label, "axis"))
        middle = (x.start + x.end) / 2
        name = f"size of the tensors, {'GiB' if self.unit == GIB else 'MiB'}"
        parts.append(text(middle, self.height - 5, name, "axis", "middle"))
        return parts


def _band(chart: _Chart, points: Sequence[dict[str, Any]]) -> list[str]:
    """The frontier with its interval."""
    where = [chart.px(p["tensor_bytes"]) for p in points]
    rises = [math.expm1(p["ln_ppl_ratio"]) for p in points]
    line = [chart.y.at(v) for v in rises]
    shown = 1 + sum(v > chart.y.low for v in rises)  # the line ends where it meets the foot
    parts = []
    if all(p["ln_ppl_ratio_low"] is not None for p in points):
        low = [chart.y.at(math.expm1(p["ln_ppl_ratio_low"])) for p in points]
        high = [chart.y.at(math.expm1(p["ln_ppl_ratio_high"])) for p in points]
        outline = list(zip(where, high, strict=True)) + list(zip(where, low, strict=True))[::-1]
        parts.append(tag("path", d=_path(outline) + "Z", class_="band"))
    parts.append(
        tag("path", d=_path(list(zip(where, line, strict=True))[:shown]), class_="frontier")
    )
    return parts


def _dots(chart: _Chart, points: Sequence[dict[str, Any]], prefix: str) -> list[str]:
    """Invisible marks along the frontier that give its numbers when pointed at."""
    parts = []
    for i, p in enumerate(points):
        ppl, low, high = (say(p[k], "ppl") for k in ("ppl", "ppl_low", "ppl_high"))
        ppl = "" if p["ppl"] is None else f"PPL {ppl} [{low}, {high}], "
        title = f"{say(p['tensor_bytes'], 'gib')}, {say(p['bpw'], 'bpw')} bpw: {ppl}" + (
            f"{say(p['ln_ppl_ratio'], 'rise')}, predicted"
        )
        at = chart.px(p["tensor_bytes"]), chart.y.at(math.expm1(p["ln_ppl_ratio"]))
        dot = tag("circle", cx=at[0], cy=at[1], r=5, class_="point")
        parts.append(hover(dot, title, f"{prefix}{i}"))
    return parts


def _knee(chart: _Chart, frontier: dict[str, Any], prefix: str) -> str:
    p = frontier["points"][frontier["knee"]]
    x, y = chart.px(p["tensor_bytes"]), chart.y.at(math.expm1(p["ln_ppl_ratio"]))
    title = f"knee: {say(p['tensor_bytes'], 'gib')}, {say(p['ln_ppl_ratio'], 'rise')}"
    body = tag("line", x1=x, x2=x, y1=y, y2=chart.y.start, class_="knee")
    body += text(x + 5, chart.y.start - 6, "knee", "tick")
    return hover(body, title, f"{prefix}frontier.knee")


def _marks(
    chart: _Chart, spots: Sequence[tuple[Spot, float]], line: Sequence[tuple[int, float]]
) -> list[str]:
    """Marks, error bars and the numbers beside them, which keep off marks and `line`."""
    labels = Labels(chart.width, chart.y.start, chart.x.start)
    for (n, a), (m, b) in pairwise(line):
        for k in range(4):
            at = n + k * (m - n) / 4
            labels.take(chart.px(at), chart.y.at(a + k * (b - a) / 4), 1.5, line=True)
    placed = [(s, chart.px(s.n_bytes), chart.y.at(max(v, 1e-12)), v) for s, v in spots]
    for spot, x, y, value in placed:
        labels.take(x, y - 4 * (value < chart.y.low), 6.5 if spot.kind == "recipe" else 3.5)
    parts, names = [], []
    for spot, x, y, value in placed:
        body = ""
        if spot.error and value > 0:
            lo, hi = (chart.y.at(max(value + k * spot.error, 1e-12)) for k in (-1, 1))
            body += tag("line", x1=x, x2=x, y1=lo, y2=hi, class_="interval")
        body += _shape(spot.kind, x, y, below=value < chart.y.low)
        parts.append(hover(body, spot.title, spot.key))
    for spot, x, y, _ in sorted(placed, key=lambda p: p[0].kind != "recipe"):
        if spot.tag:
            size = 11.0 if spot.kind == "recipe" else 9.0
            gap = 9.0 if spot.kind == "recipe" else 7.0
            name = labels.place(x, y, spot.tag, size, gap)
            if name:
                names.append(name.replace('class="label"', f'class="label {spot.kind}-name"'))
    return parts + names


def _shape(kind: str, x: float, y: float, *, below: bool) -> str:
    """The mark of a kind; below the foot of the axis it points down."""
    if below:
        return tag("path", d=f"M{x - 5:.1f} {y - 8:.1f}h10l-5 8z", class_=kind)
    if kind == "recipe":
        return tag("path", d=f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z", class_=kind)
    if kind == "stock":
        return tag("rect", x=x - 4, y=y - 4, width=8, height=8, class_=kind)
    return tag("circle", cx=x, cy=y, r=4.5 if kind == "ours" else 4, class_=kind)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
