"""What contiguous splits of the layers promise, GPU by GPU: bounds that know whole layers.

`leading` counts the GPUs as one, and of a layer's experts any part may stay there. Here the experts
are whole: a GPU holds the layers from i to j and the experts of exactly k of them within its own
bytes; types alone are relaxed. With prices of RAM and of the third limit, its least cost is

    w(i, j) = min_k max_λ  Σ_{i ≤ l < j} (rest_l + ram_l) + the k least (gpu_l - ram_l) - λ·room

where λ is its own price, rest_l the priced cost of what stays with layer l, gpu_l that of its
experts on the GPU and ram_l that of its experts in RAM. Every λ gives a bound (Everett 1963), so a
grid of them does. A dynamic programme over the ends of the layers adds up the GPUs, for all numbers
of leading layers in RAM at once; where its optimum lies is a split worth solving.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmix.memory.kv import kv_bytes
from quantmix.memory.plan import derived_bytes
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.rig.device import Rig
from quantmix.search.leading import Bounds, Prices, by_layer, outside_cost, ram_side, sums
from quantmix.solve.problem import FloatArray, IntArray

_INNER, _N_INNER = 1.14, 8  # steps of the grid of λ near the price of all GPUs as one
_OUTER, _N_OUTER = 1.8, 3  # and beyond
_STEP = 1.06  # of the prices of RAM and of the third limit
_MOST_STEPS = 3
_LITTLE = 1e-4
_NEARLY_FREE = 1e-4
_MORE = 3  # layers' experts beyond those that fit at the types which the price of all picks


@dataclass(frozen=True)
class Split:
    """A split: layers per GPU, how many of them keep their experts; the bound's level of z."""

    layers: tuple[int, ...]
    kept: tuple[int, ...]
    level: int


@dataclass(frozen=True)
class _Priced:
    """Priced costs of the layers: (L, n) on a GPU at every λ, (n,) in RAM.

    `rest` stays with its layer, `experts` may move; `moved` is what those cost in RAM, waiting
    included; `in_ram` is a whole layer there.
    """

    grid: FloatArray
    rest: FloatArray
    experts: FloatArray
    moved: FloatArray
    in_ram: FloatArray


@dataclass(frozen=True)
class _Ranges:
    """Least cost of a GPU with d layers from i on, (n + 1, n + 1), and the k that has it."""

    cost: FloatArray
    kept: IntArray


class Splits:
    """Tightens bounds where asked to, and says which split has them."""

    def __init__(self, bounds: Bounds, model: Model, rig: Rig, settings: Settings) -> None:
        self.bounds = bounds
        layers = bounds.layers
        self.n = len(layers.waiting)
        n_bytes = np.array(derived_bytes(model, settings), dtype=np.float64)
        if not settings.nkvo:
            n_bytes += np.array(kv_bytes(model, settings))
        # Blocks beyond the plan follow its last one (`Placement.homes`).
        self.beside = np.append(n_bytes[: self.n - 1], n_bytes[self.n - 1 :].sum())
        self.has_experts = np.zeros(self.n, dtype=np.bool_)
        self.has_experts[layers.layer[layers.movable]] = True
        each = bounds.each_gpu
        same = [
            [np.array_equal(a.cost, b.cost) and np.array_equal(a.third, b.third) for a in each]
            for b in (each if bounds.timed else each[:1])
        ]
        # GPUs whose types cost the same, named after the first of them.
        self.kind = [row.index(True) for row in same] if bounds.timed else [0] * len(rig.gpus)
        self.capacity = [g.capacity_bytes or 0 for g in rig.gpus]
        self.known: set[tuple[int, ...]] = set()

    def look(self, z: int, c: int) -> list[Split]:
        """Tighten the bounds of level `z` and counts like `c`; return their splits, best first.

        The prices of RAM and of the third limit are moved as long as that helps, the first time.
        """
        room = self._room(z, c)
        gpu, ram, third = self.bounds.at[:, z, c].tolist()
        middle = max(gpu, ram) or self.bounds.least_price
        ram = ram or _NEARLY_FREE * middle  # where RAM has room, GPUs still come first
        if not room or not np.isfinite(self.bounds.best[z, c]):
            return []
        alike = self._alike(z, c, room)
        if c not in alike:
            return []
        found: list[tuple[float, Split | None]] = []

        def value(ram: float, third: float) -> float:
            grid = middle * _grid()
            values, split = self._at(z, c, room, Prices(grid, np.array([ram]), third))
            there = self.bounds.best[z]
            there[alike] = np.maximum(there[alike], values[alike])
            found.append((float(values[c]), split))
            return float(values[c])

        best = value(ram, third)
        first = (z, *alike.tolist()) not in self.known
        self.known.add((z, *alike.tolist()))
        for towards in (((1, 0), (0, 1)) if third else ((1, 0),)) if first else ():
            for step in (_STEP, 1 / _STEP):
                before = best
                for _ in range(_MOST_STEPS):
                    there = ram * step ** towards[0], third * step ** towards[1]
                    now = value(*there)
                    if not now > best + _LITTLE * abs(best):
                        break
                    best, (ram, third) = now, there
                if best > before:
                    break
        found.sort(key=lambda f: -f[0])
        return list(dict.fromkeys(split for _, split in found if split is not None))

    def _room(self, z: int, c: int) -> tuple[float, ...]:
        """Return the bytes that each GPU has for weights and for what its layers bring along."""
        layers = self.bounds.layers
        level, memory = int(layers.lowest[z]), layers.counts[c].memory
        return tuple(
            capacity
            - min(m[p].fixed_bytes(level) - m[p].kv_bytes - m[p].derived_bytes for m in memory)
            for p, capacity in enumerate(self.capacity)
        )

    def _alike(self, z: int, c: int, room: tuple[float, ...]) -> IntArray:
        """Return the counts that differ from `c` in the number of layers alone."""
        counts = self.bounds.layers.counts
        one = counts[c]
        return np.array(
            [
                i
                for i, other in enumerate(counts)
                if other.moves == one.moves
                and other.outside is one.outside
                and other.n_layers + len(room) <= self.n
                and self._room(z, i) == room
            ],
            dtype=np.int64,
        )

    def _at(
        self, z: int, c: int, room: tuple[float, ...], prices: Prices
    ) -> tuple[FloatArray, Split | None]:
        """Return (C,) bounds at prices, right for counts like `c`, and the split of `c`."""
        bounds, layers = self.bounds, self.bounds.layers
        priced = {k: self._priced(z, prices, k) for k in set(self.kind)}
        own = priced[self.kind[-1]]
        nothing = np.full(len(layers.counts), -np.inf)
        if not np.isfinite(own.moved).all():
            return nothing, None
        moves = layers.counts[c].moves
        head = outside_cost(bounds.outside[c], prices)[:, 0]
        ways = list(zip(self.kind, room, strict=True))[:-1]
        for most in self._most(max(room), prices) if moves else [0]:
            tables = {
                (k, r): table
                for k in dict.fromkeys(k for k, _ in ways)
                for r, table in self._tables(
                    priced[k], tuple(r for kind, r in ways if kind == k), most, moves
                ).items()
            }
            last = self._last(own, head, room[-1], most, moves)
            # The least cost is convex in k: where it is not the last k, no larger one is better.
            if not any((t.kept == most).any() for t in (*tables.values(), last)):
                break
        each = [*(tables[way] for way in ways), last]
        ends, steps = _added(each)
        before = sums(own.in_ram)
        n_layers = np.array([count.n_layers for count in layers.counts])
        values = ends[n_layers] + before[n_layers] - prices.ram[0] * layers.ram[:, z]
        if bounds.room is not None:
            values = values - prices.third * bounds.room
        at, n_each, kept = int(n_layers[c]), [], []
        for step, table in zip(steps, each, strict=True):
            d = int(step[at])
            n_each.append(d)
            kept.append(int(table.kept[at, d]))
            at += d
        keeps = tuple(kept if moves else n_each)
        split = Split(tuple(n_each), keeps, int(layers.highest[z]))
        return values, split if all(n_each) else None

    def _priced(self, z: int, prices: Prices, kind: int) -> _Priced:
        """Return what the layers cost at prices on a kind of GPU, experts in RAM up to `z`."""
        bounds, layers = self.bounds, self.bounds.layers
        rest, experts = by_layer(layers, bounds.each_gpu[kind], prices.gpu, prices.third)
        rest = rest + prices.gpu[:, None] * self.beside
        rest_ram, _ = by_layer(layers, bounds.ram, prices.ram, prices.third)
        _, moved = by_layer(layers, ram_side(bounds, z), prices.ram, prices.third)
        waits = bounds.wait[0] + prices.third * bounds.wait[1]
        return _Priced(prices.gpu, rest, experts, (moved + waits)[0], (rest_ram + moved)[0])

    def _most(self, room: float, prices: Prices) -> list[int]:
        """Return how many layers' experts are worth looking at, and how many fit at the least."""
        layers = self.bounds.layers
        cost = self.bounds.gpu.cost + prices.third * self.bounds.gpu.third
        middle = float(np.median(prices.gpu))
        at = (cost + middle * layers.n_bytes).argmin(axis=1)
        usual = layers.n_bytes[np.arange(len(at)), at]
        least = np.where(layers.on_gpu, layers.n_bytes, np.inf).min(axis=1)
        fitting = []
        for n_bytes in (usual, least):
            each = np.bincount(layers.layer, np.where(layers.movable, n_bytes, 0.0), self.n)
            smallest = float(each[self.has_experts].min(initial=np.inf))
            fitting.append(self.n if smallest <= 0 else min(self.n, max(0, int(room // smallest))))
        return [min(fitting[0] + _MORE, fitting[1]), fitting[1]]

    def _tables(
        self, priced: _Priced, rooms: tuple[float, ...], most: int, moves: bool
    ) -> dict[float, _Ranges]:
        """Return the ranges of every size of GPU; one without layers costs nothing."""
        shape = (self.n + 1, self.n + 1)
        tables = {
            r: _Ranges(np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)) for r in rooms
        }
        for table in tables.values():
            table.cost[:, 0] = 0.0
        if not tables:
            return tables
        n, gain, here = self.n, self._gain(priced), sums(self._beside(priced, moves))
        least = _nothing((len(priced.grid), n), most)
        for d in range(1, n + 1):
            least = _with(least[:, : n + 1 - d], gain[:, d - 1 :, None])
            experts = _sums_of(least)
            stays = here[:, d:] - here[:, : n + 1 - d]
            for r, table in tables.items():
                there = (experts + (stays - priced.grid[:, None] * r)[:, :, None]).max(axis=0)
                table.kept[: n + 1 - d, d] = k = there.argmin(axis=1)
                table.cost[: n + 1 - d, d] = there[np.arange(n + 1 - d), k]
        return tables

    def _last(
        self, priced: _Priced, head: FloatArray, room: float, most: int, moves: bool
    ) -> _Ranges:
        """Return the ranges of the last GPU, which end with the layers and have the head."""
        n, gain, each = self.n, self._gain(priced), self._beside(priced, moves)
        here = head - priced.grid * room
        least = _nothing((len(priced.grid),), most)
        cost, kept = np.full((n + 1, n + 1), np.inf), np.zeros((n + 1, n + 1), dtype=np.int64)
        for d in range(n + 1):
            if d:
                here = here + each[:, n - d]
                least = _with(least, gain[:, n - d, None])
            there = (here[:, None] + _sums_of(least)).max(axis=0)
            kept[n - d, d] = k = int(there.argmin())
            cost[n - d, d] = there[k]
        return _Ranges(cost, kept)

    def _beside(self, priced: _Priced, moves: bool) -> FloatArray:
        """Return (L, n) what layers cost besides the choice of those that keep their experts."""
        if moves:
            return priced.rest + np.where(self.has_experts, priced.moved, 0.0)
        return priced.rest + priced.experts

    def _gain(self, priced: _Priced) -> FloatArray:
        """Return (L, n) what experts on a GPU cost beyond what they cost in RAM."""
        return np.where(self.has_experts, priced.experts - priced.moved, np.inf)


def _nothing(shape: tuple[int, ...], most: int) -> FloatArray:
    """Return rows for the `most` least values of nothing, behind a bar that no value passes."""
    rows = np.full((*shape, most + 1), np.inf)
    rows[..., 0] = -np.inf
    return rows


def _with(least: FloatArray, value: FloatArray) -> FloatArray:
    """Return the least values of each row, ascending behind the bar, with one more value."""
    more = least.copy()
    np.minimum(least[..., 1:], value, out=more[..., 1:])
    np.maximum(more[..., 1:], least[..., :-1], out=more[..., 1:])
    return more


def _sums_of(least: FloatArray) -> FloatArray:
    """Return the sums of the 0, 1, … least values of each row."""
    total = least.copy()
    total[..., 0] = 0.0
    return np.cumsum(total, axis=-1, out=total)


def _added(tables: list[_Ranges]) -> tuple[FloatArray, list[NDArray[np.int64]]]:
    """Return (n + 1,) least costs of the layers from i on, and each GPU's layers at every i."""
    *tables, last = tables
    n = len(last.cost) - 1
    rows = np.arange(n + 1)
    ends = last.cost[rows, n - rows]
    steps = [n - rows]
    later = rows[:, None] + rows
    for table in reversed(tables):
        rest = np.where(later <= n, ends[np.minimum(later, n)], np.inf)
        whole = table.cost + rest
        step = whole[:, 1:].argmin(axis=1) + 1
        step = np.where(whole[rows, step] <= whole[:, 0], step, 0)  # of equals one in use
        ends = whole[rows, step]
        steps.insert(0, step)
    return ends, steps


def _grid() -> FloatArray:
    """Return factors of a price, from 0 up: close together near 1, far apart beyond."""
    inner = _INNER ** np.arange(-_N_INNER, _N_INNER + 1.0)
    outer = inner[-1] * _OUTER ** np.arange(1.0, _N_OUTER + 1)
    return np.array([0.0, *(1 / outer[::-1]), *inner, *outer], dtype=np.float64)
