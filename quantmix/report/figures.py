"""Figures by matplotlib: memory per device, types over the layers, perplexity against size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmix.errors import UsageError
from quantmix.ggml.types import FLOATS
from quantmix.report.svg import Scale
from quantmix.units import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from quantmix.recipe import PlannedTensor, Recipe

# Okabe-Ito: told apart by people who see colours differently.
COMPONENTS = (
    ("weights_bytes", "weights", "#0072B2"),
    ("kv_bytes", "KV cache", "#E69F00"),
    ("derived_bytes", "built at load", "#CC79A7"),
    ("compute_bytes", "compute buffer", "#009E73"),
    ("reserve_bytes", "reserve", "#999999"),
)
_INK, _GRID = "#222222", "#DDDDDD"


def save(figure: Figure, path: Any) -> None:
    """Write a PNG or SVG without metadata, so that the same recipe gives the same bytes.

    Raises:
        UsageError: the name ends neither in .png nor in .svg, or cannot be written.
    """
    from matplotlib import rc_context

    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg"):
        raise UsageError(f"a figure ends in .png or .svg, not {kind or 'nothing'}: {path}")
    metadata = {"Software": None} if kind == ".png" else {"Date": None, "Creator": None}
    try:
        with rc_context({"svg.hashsalt": "quantmix"}):
            figure.savefig(path, dpi=110, metadata=metadata)
    except OSError as err:
        raise UsageError(f"cannot write {path}: {err.strerror}") from err


def memory_figure(recipe: Recipe) -> Figure:
    """Return bars of what every device holds, against its capacity."""
    devices = recipe.devices
    figure, axes = _canvas(8.4, 1.5 + 0.46 * len(devices))
    for row, device in enumerate(devices):
        left = 0.0
        for key, label, colour in COMPONENTS:
            width = getattr(device, key) / GIB
            if width:
                axes.barh(row, width, left=left, color=colour, height=0.62, label=label)
                left += width
        if device.capacity_bytes is not None:
            edge = device.capacity_bytes / GIB
            axes.plot([edge, edge], [row - 0.42, row + 0.42], color=_INK, linewidth=1.6)
    axes.set_yticks(range(len(devices)), [d.name for d in devices])
    axes.invert_yaxis()
    axes.set_xlabel("GiB (the line is the capacity)")
    axes.set_title(f"{recipe.model.id}: memory at {recipe.settings.ctx} context", loc="left")
    _tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(unique.values()), list(unique), ncols=5, loc="outside lower center", frameon=False
    )
    return figure


def types_figure(recipe: Recipe) -> Figure:
    """Return a map of roles against layers, coloured by bits per weight, types named."""
    roles, grid, names = role_grid(recipe)
    figure, axes = _canvas(10.5, 1.9 + 0.32 * len(roles))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=1.5, vmax=8.5)
    axes.set_yticks(range(len(roles)), roles, fontsize=8)
    axes.set_xlabel("layer")
    axes.set_title(f"{recipe.model.id}: {recipe.size.bpw:.3f} bpw, types by layer", loc="left")
    for row, cells in enumerate(names):
        start = 0
        for col in range(1, len(cells) + 1):
            if col == len(cells) or cells[col] != cells[start]:
                if cells[start] and col - start >= 0.75 * len(cells[start]):
                    shade = "white" if grid[row][start] < 5.5 else "black"
                    axes.text(
                        (start + col - 1) / 2,
                        row,
                        cells[start],
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color=shade,
                    )
                start = col
    figure.colorbar(image, ax=axes, label="bits per weight", pad=0.01)
    return figure


def curve_figure(section: dict[str, Any]) -> Figure:
    """Return the rise of perplexity against size, from a section of `report.data`."""
    figure, axes = _canvas(8.4, 5.2)
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
            ([m for m in section["measured"] if not m["ours"]], "s", _INK, "measured"),
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
    _tidy(axes)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
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
        sizes[at], rises("ln_ppl_ratio")[at], "|", color=_INK, markersize=16, label="knee"
    )  # fmt: skip


def role_grid(recipe: Recipe) -> tuple[list[str], list[list[float]], list[list[str]]]:
    """Return roles, their bits per weight per layer (nan where absent) and their type names.

    Floats are left out, unless the recipe has nothing else: then its matrices are shown.
    """
    layered = [t for t in recipe.tensors if t.layer is not None]
    blocks = [t for t in layered if t.type not in FLOATS]
    blocks = blocks or [t for t in layered if len(t.shape) > 1]
    n_layers = max((t.layer or 0 for t in blocks), default=0) + 1
    roles = list(dict.fromkeys(t.role for t in blocks))
    index = {role: i for i, role in enumerate(roles)}
    grid = [[float("nan")] * n_layers for _ in roles]
    names = [[""] * n_layers for _ in roles]
    for t in blocks:
        grid[index[t.role]][t.layer or 0] = bits(t)
        names[index[t.role]][t.layer or 0] = t.type
    return roles, grid, names


def bits(tensor: PlannedTensor) -> float:
    """Return bits per weight of a planned tensor."""
    return 8 * tensor.bytes / tensor.n_elements


def _canvas(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of so many inches that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
