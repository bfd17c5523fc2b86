"""Figures of a recipe by matplotlib: memory per device, types over the layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmix.errors import UsageError
from quantmix.ggml.types import FLOATS
from quantmix.units import GIB

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
INK, GRID = "#222222", "#DDDDDD"


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
    figure, axes = canvas(8.4, 1.5 + 0.46 * len(devices))
    for row, device in enumerate(devices):
        left = 0.0
        for key, label, colour in COMPONENTS:
            width = getattr(device, key) / GIB
            if width:
                axes.barh(row, width, left=left, color=colour, height=0.62, label=label)
                left += width
        if device.capacity_bytes is not None:
            edge = device.capacity_bytes / GIB
            axes.plot([edge, edge], [row - 0.42, row + 0.42], color=INK, linewidth=1.6)
    axes.set_yticks(range(len(devices)), [d.name for d in devices])
    axes.invert_yaxis()
    axes.set_xlabel("GiB (the line is the capacity)")
    axes.set_title(f"{recipe.model.id}: memory at {recipe.settings.ctx} context", loc="left")
    tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(unique.values()), list(unique), ncols=5, loc="outside lower center", frameon=False
    )
    return figure


def types_figure(recipe: Recipe) -> Figure:
    """Return a map of roles against layers, coloured by bits per weight, types named."""
    roles, grid, names = role_grid(recipe)
    figure, axes = canvas(10.5, 1.9 + 0.32 * len(roles))
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


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of so many inches that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def tidy(axes: Any) -> None:
    """Take away what distracts from the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
