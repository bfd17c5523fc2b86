"""Perplexity against size as a picture, by matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmix.emit.figures import GRID, INK, canvas, save, tidy
from quantmix.report.svg import Scale
from quantmix.units import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_curve(section: dict[str, Any], path: Path) -> None:
    """Write the curve of a section of `report.data` as PNG or SVG.

    Raises:
        UsageError: the name ends in neither, or cannot be written.
    """
    save(curve_figure(section), path)


def curve_figure(section: dict[str, Any]) -> Figure:
    """Return the rise of perplexity against size, from a section of `report.data`."""
    figure, axes = canvas(8.4, 5.2)
    frontier = section["frontier"]
    unit, unit_name = _unit(section)
    tops = []
    if frontier:
        tops = [p["ln_ppl_ratio"] for p in frontier["points"]]
        _draw_frontier(axes, frontier, unit)
    spots = [
        ([(p["tensor_bytes"], p["ln_ppl_ratio"]) for p in rows], mark, colour, label)
        for rows, mark, colour, label in (
            (frontier["published"] if frontier else [], "o", "#009E73", "published"),
            ([m for m in section["measured"] if not m["ours"]], "s", INK, "measured"),
            ([m for m in section["measured"] if m["ours"]], "o", "#D55E00", "ours, measured"),
            ([{"tensor_bytes": r["size"]["tensor_bytes"], **r["quality"]}
              for r in section["recipes"]], "D", "#B0258B", "recipe, predicted"),
        )
    ]  # fmt: skip
    for points, mark, colour, label in spots:
        known = [(n, v) for n, v in points if v is not None]
        tops += [v for _, v in known]
        if known:
            hollow = mark == "s" or label == "published"
            axes.plot(
                [n / unit for n, _ in known],
                [100 * math.expm1(v) for _, v in known],
                mark,
                color=colour,
                markerfacecolor="white" if hollow else colour,
                markersize=6,
                label=label,
            )
    above = [100 * math.expm1(v) for v in tops if v > 0] or [1.0]
    lowest = max(min(above) / 1.25, min(0.1, max(above) / 30))
    axes.set(xscale="log", yscale="log", ylim=(lowest, max(above) * 1.3))
    for axis, limits, most in ((axes.xaxis, axes.get_xlim(), 12), (axes.yaxis, axes.get_ylim(), 9)):
        ticks = Scale(limits[0], limits[1], 0.0, 1.0, log=True).ticks(most)
        axis.set_ticks(ticks, [f"{v:g}" for v in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel(f"size of the tensors, {unit_name}")
    axes.set_ylabel("rise of perplexity, %")
    axes.set_title(f"{section['name']}: perplexity against size", loc="left")
    tidy(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(frameon=False)
    return figure


def _unit(section: dict[str, Any]) -> tuple[int, str]:
    """Return GiB, or MiB when everything is smaller than one."""
    sizes = [m["tensor_bytes"] for m in section["measured"]]
    sizes += [r["size"]["tensor_bytes"] for r in section["recipes"]]
    sizes += [p["tensor_bytes"] for p in (section["frontier"] or {}).get("points", [])]
    return (GIB, "GiB") if max(sizes, default=GIB) >= GIB else (MIB, "MiB")


def _draw_frontier(axes: Any, frontier: dict[str, Any], unit: int) -> None:
    points = frontier["points"]
    sizes = [p["tensor_bytes"] / unit for p in points]

    def rises(key: str) -> list[float]:
        return [100 * max(math.expm1(p[key]), 1e-9) for p in points]

    if all(p["ln_ppl_ratio_low"] is not None for p in points):
        axes.fill_between(
            sizes,
            rises("ln_ppl_ratio_low"),
            rises("ln_ppl_ratio_high"),
            color="#0072B2",
            alpha=0.13,
            linewidth=0,
            label=f"{frontier['interval']:.0%} interval",
        )
    axes.plot(sizes, rises("ln_ppl_ratio"), color="#0072B2", linewidth=1.8, label="predicted")
    at = frontier["knee"]
    axes.plot(
        sizes[at], rises("ln_ppl_ratio")[at], "|", color=INK, markersize=16, label="knee"
    )  # fmt: skip
