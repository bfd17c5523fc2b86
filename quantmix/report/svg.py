"""Just enough SVG: elements, scales with ticks, and labels that keep out of each other's way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product
from typing import Any, Final

# From coarse to fine: which multiples of a power of ten may carry a tick.
_LADDERS: Final = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
)


def tag(name: str, content: str | None = None, **attributes: Any) -> str:
    """Return one element; `_` in attribute names becomes `-`, trailing ones are dropped."""
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(text)}"')
    opening = " ".join(parts)
    return f"<{opening}/>" if content is None else f"<{opening}>{content}</{name}>"


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """Return a line of text of class `kind`."""
    side = None if anchor == "start" else anchor
    return tag("text", escape(content), x=x, y=y, class_=kind or None, text_anchor=side)


def drawing(width: float, height: float, label: str, parts: Iterable[str], kind: str = "") -> str:
    """Return a whole inline SVG, as wide as its container allows, described by `label`."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>"
    )


def hover(content: str, title: str, key: str | None = None) -> str:
    """Return a group that says `title` when pointed at; `key` names its place in the JSON."""
    return tag("g", tag("title", escape(title)) + content, class_="mark", data_k=key)


@dataclass(frozen=True, slots=True)
class Scale:
    """Values in [low, high] on pixels from `start` to `end`, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value, clamped to the ends."""
        value = min(max(value, self.low), self.high)
        a, b, v = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.log
            else (self.low, self.high, value)
        )
        share = 0.5 if a == b else (v - a) / (b - a)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Return at most `most` round values inside the scale."""
        return _log_ticks(self.low, self.high, most) if self.log else self._linear(most)

    def _linear(self, most: int) -> list[float]:
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        step = 10.0 ** math.floor(math.log10(span / most))
        for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0):
            first, last = math.ceil(self.low / step / factor), math.floor(self.high / step / factor)
            if last - first + 1 <= most:
                return [k * step * factor for k in range(first, last + 1)]
        return [self.low, self.high]


@dataclass
class Labels:
    """Boxes taken on a chart; a new label goes to the first free place beside its point."""

    width: float
    height: float
    left: float = 0.0
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    lines: list[tuple[float, float, float, float]] = field(default_factory=list)

    def take(self, x: float, y: float, radius: float, *, line: bool = False) -> None:
        """Keep labels off a mark; off a `line` only while there is room elsewhere."""
        where = self.lines if line else self.boxes
        where.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, x: float, y: float, content: str, size: float, gap: float = 7.0) -> str | None:
        """Return the label as text, or None when every place near (x, y) is taken."""
        w, h = 0.6 * size * len(content), size
        places: Sequence[tuple[float, float]] = (
            (x + gap, y + h / 3),
            (x - w / 2, y - gap),
            (x - w - gap, y + h / 3),
            (x - w / 2, y + gap + h * 0.75),
            (x + gap * 0.7, y - gap * 0.7),
            (x + gap * 0.7, y + gap * 0.7 + h * 0.75),
            (x - w - gap * 0.7, y - gap * 0.7),
        )
        for taken, (left, base) in product((self.boxes + self.lines, self.boxes), places):
            box = (left, base - h * 0.8, left + w, base + h * 0.15)
            inside = (
                box[0] >= self.left
                and box[2] <= self.width
                and box[1] >= 0
                and box[3] <= self.height
            )
            if inside and not any(_overlap(box, other) for other in taken):
                self.boxes.append(box)
                return text(left, base, content, "label")
        return None


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    best: list[float] = []
    for ladder in _LADDERS:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [round(m * 10.0**p, 12) for p in powers for m in ladder]
        found = [v for v in found if low <= v <= high]
        if len(found) > most:
            break
        best = found
    if len(best) < 2:
        return [v for v in Scale(low, high, 0, 1)._linear(most) if v > 0]
    return best
