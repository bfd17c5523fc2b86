"""What every number of leading layers in RAM promises: lower bounds for all of them at once.

For prices of GPU memory, of RAM and, where there is one, of a third limit, every tensor takes its
cheapest type where it may lie, and a layer on a GPU leaves its experts there or in RAM, whichever
is cheaper. Summed, less what the prices pay for, that is below every mix (Everett 1963). All
numbers of layers share the sums. The GPUs count as one, with buffers as small as any set of
experts in RAM makes them, so a bound holds for every split of the layers and every such set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmix.memory.homes import is_movable
from quantmix.memory.model import DeviceMemory
from quantmix.rig.device import Rig
from quantmix.search.choices import Choices
from quantmix.search.timing import Timing
from quantmix.solve.problem import FloatArray, IntArray

_DECADES = 8  # of prices, below the steepest step of any tensor
_COARSE = 4.0  # between prices of the first look
_COARSE_THIRD = 30.0  # the same of a third limit
_ZOOMS = (2.0, 1.5, 1.2, 1.08, 1.03)  # factors by which the best prices are then moved
_MOST_LOOKS = 30
_LITTLE = 1e-4
_MOST_LEVELS = 100
_STEEP = 30.0


@dataclass(frozen=True)
class Count:
    """One number of leading layers in RAM.

    Attributes:
        slots: first slots in RAM (`head.host_slots`). n_layers: blocks among them.
        memory: the devices with no experts in RAM besides those layers', and with all.
        outside: choices of a placement with that number, for what lies outside the layers.
        fixed_seconds: per token, whatever the types, waiting for experts in RAM left out.
        in_use_seconds: the same with a cache in use.
        moves: whether experts of other layers may lie in RAM.
    """

    slots: int
    n_layers: int
    memory: tuple[Sequence[DeviceMemory], Sequence[DeviceMemory]]
    outside: Choices
    fixed_seconds: float
    in_use_seconds: float
    moves: bool = True


@dataclass(frozen=True)
class Side:
    """The layers' groups on GPUs, or in RAM: (G, Q) cost (+inf: not allowed) and third use."""

    cost: FloatArray
    third: FloatArray


@dataclass(frozen=True)
class _Outside:
    """Groups outside the layers, (G, J): cost, bytes on GPUs and in RAM, third use."""

    cost: FloatArray
    gpu: FloatArray
    ram: FloatArray
    third: FloatArray


@dataclass(frozen=True)
class Prices:
    """What a byte of the GPUs, a byte of RAM and a unit of the third limit cost."""

    gpu: FloatArray
    ram: FloatArray
    third: float


@dataclass(frozen=True)
class Layers:
    """The groups of tensors inside the layers and the numbers of layers that RAM may hold.

    Attributes:
        counts: (C,) ascending by slots; several of one number are its variants.
        layer, movable: (G,) block, and whether it may lie in RAM while the block is on a GPU.
        n_bytes: (G, Q). level: (G, Q) bytes of the largest expert tensor. on_gpu, in_ram: (G, Q)
            whether the type may lie there. damage: (G, Q); gpu_seconds: (P, G, Q) on each GPU;
            ram_seconds likewise. waiting: (n_blocks,) seconds that experts in RAM add.
        lowest, highest: (Z,) ranges of the level; gpu, ram: (C, Z) bytes left at their low end.
    """

    counts: tuple[Count, ...]
    layer: IntArray
    movable: NDArray[np.bool_]
    n_bytes: FloatArray
    level: FloatArray
    on_gpu: NDArray[np.bool_]
    in_ram: NDArray[np.bool_]
    damage: FloatArray
    gpu_seconds: FloatArray
    ram_seconds: FloatArray
    waiting: FloatArray
    lowest: FloatArray
    highest: FloatArray
    gpu: FloatArray
    ram: FloatArray

    @classmethod
    def of(cls, counts: Sequence[Count], rig: Rig, timing: Timing, n_blocks: int) -> Layers:
        """Return the layers of the model that `counts` are about."""
        choices = counts[0].outside
        model, palette = choices.model, choices.palette
        groups = [g for g in choices.groups if _inside(choices, g.members[0], n_blocks)]
        member = np.array([m for g in groups for m in g.members], dtype=np.int64)
        owner = np.repeat(np.arange(len(groups)), [len(g.members) for g in groups])
        first = [model.tensors[g.members[0]] for g in groups]
        kept = palette.kept_bytes[member] > 0
        is_loaded = np.array([model.tensors[m].loaded for m in member])
        is_expert = np.array([model.tensors[m].role.endswith("_exps") for m in member])
        shape = (len(groups), len(palette.types))

        def summed(rows: FloatArray) -> FloatArray:
            total = np.zeros(shape)
            np.add.at(total, owner, rows)
            return total

        def seconds(device: FloatArray, of_kept: FloatArray) -> FloatArray:
            return summed(np.where(kept[:, None], of_kept[member][:, None], device[member]))

        each = np.where(kept[:, None], palette.kept_bytes[member][:, None], palette.bytes[member])
        allowed = np.ones(shape, dtype=np.bool_)
        np.logical_and.at(allowed, owner, palette.allowed[member] | kept[:, None])
        all_kept = np.ones(len(groups), dtype=np.bool_)
        np.logical_and.at(all_kept, owner, kept)
        level = np.zeros(shape)
        np.maximum.at(level, owner, np.where(is_expert[:, None], each, 0.0))
        n_gpus = len(rig.gpus)
        on_each = zip(timing.cells[: n_gpus or 1], timing.kept[: n_gpus or 1], strict=True)
        in_ram = (allowed & palette.cpu) | all_kept[:, None]
        lowest, highest = _levels(counts, level[in_ram])
        room = [[_room(rig, c, float(z)) for z in lowest] for c in counts]
        return cls(
            counts=tuple(counts),
            layer=np.array([t.layer for t in first], dtype=np.int64),
            movable=np.array([is_movable(model, t) for t in first]),
            n_bytes=summed(np.where(is_loaded[:, None], each, 0.0)),
            level=level,
            on_gpu=(allowed & palette.gpu) | all_kept[:, None],
            in_ram=in_ram,
            damage=summed(np.where(kept[:, None], 0.0, palette.damage[member])),
            gpu_seconds=np.stack([seconds(*here) for here in on_each]),
            ram_seconds=seconds(timing.cells[-1], timing.kept[-1]),
            waiting=timing.waiting(n_blocks),
            lowest=lowest,
            highest=highest,
            gpu=np.array([[r[0] for r in row] for row in room]),
            ram=np.array([[r[1] for r in row] for row in room]),
        )

    @property
    def slots(self) -> IntArray:
        """Numbers of first slots in RAM, (K,)."""
        return np.unique([c.slots for c in self.counts])

    def of_slots(self, values: FloatArray) -> FloatArray:
        """Return the least of (C,) values for every number of slots, (K,)."""
        starts = np.unique([c.slots for c in self.counts], return_index=True)[1]
        return np.asarray(np.minimum.reduceat(values, starts))

    def least_damage(self, seconds: float | None) -> Bounds:
        """Return what damage no mix undercuts, with at most so many seconds per token."""
        fixed = np.array([c.fixed_seconds for c in self.counts])
        room = None if seconds is None else seconds - fixed
        return Bounds(self, "damage", room)

    def least_seconds(self, damage: float | None) -> Bounds:
        """Return what seconds per token, besides the fixed ones, a damage costs at least."""
        room = None if damage is None else np.full(len(self.counts), damage)
        return Bounds(self, "seconds", room)

    @property
    def fixed_seconds(self) -> FloatArray:
        """Seconds per token of every number of slots that no choice of types changes, (K,)."""
        return self.of_slots(np.array([c.fixed_seconds for c in self.counts]))

    @property
    def in_use_seconds(self) -> FloatArray:
        """The same with a cache in use, (K,)."""
        return self.of_slots(np.array([c.in_use_seconds for c in self.counts]))


class Bounds:
    """The best bounds known for every level and count, (Z, C), and the prices that gave them.

    Coarse for all, sharper for those that promise most, and sharpest at prices that somebody who
    solved one count knows (`learn`).
    """

    def __init__(self, layers: Layers, objective: str, room: FloatArray | None) -> None:
        self.layers = layers
        self.room = room
        self.timed = room is not None or objective != "damage"
        is_damage = objective == "damage"
        every, ram = layers.gpu_seconds, layers.ram_seconds
        self.each_gpu = [_side(layers.on_gpu, layers.damage, s, is_damage) for s in every]
        self.gpu = _side(layers.on_gpu, layers.damage, every.min(axis=0), is_damage)
        self.ram = _side(layers.in_ram, layers.damage, ram, is_damage)
        self.wait = (0.0, layers.waiting) if is_damage else (layers.waiting, 0.0)
        n_blocks = len(layers.waiting)
        outside = {id(c.outside): c.outside for c in layers.counts}
        each = {i: _outside(o, n_blocks, is_damage) for i, o in outside.items()}
        self.outside = [each[id(c.outside)] for c in layers.counts]
        shape = (len(layers.highest), len(layers.counts))
        self.best = np.full(shape, -np.inf)
        self.at = np.zeros((3, *shape))
        self._search()

    @property
    def lower(self) -> FloatArray:
        """Lower bounds for every number of slots, (K,)."""
        return self.layers.of_slots(self.best.min(axis=0))

    def learn(self, gpu: float, ram: float, third: float) -> None:
        """Look at all counts at the prices that are right for one of them."""
        self._look(Prices(np.array([gpu]), np.array([ram]), third))

    def _search(self) -> None:
        third = [0.0]
        if self.room is not None:
            third = _grid(self._steepest(self.gpu.third), _COARSE_THIRD).tolist()
        memory = _grid(self._steepest(self.layers.n_bytes), _COARSE)
        self.least_price = float(memory[1])
        for price in third:
            self._look(Prices(memory, memory, price))
        done = np.zeros(self.best.shape, dtype=np.int64)
        for _ in range(_MOST_LOOKS):
            z, k = np.unravel_index(int(self.best.argmin()), self.best.shape)
            if done[z, k] == len(_ZOOMS):
                break
            before = self.best[z, k]
            for prices in self._around(z, k, _ZOOMS[done[z, k]]):
                self._look(prices)
            if self.best[z, k] <= before + _LITTLE * abs(before):
                done[z, k] += 1

    def _around(self, z: np.intp, k: np.intp, factor: float) -> Iterator[Prices]:
        """Prices near the best known ones of a level and a count."""
        gpu, ram, third = self.at[:, z, k].tolist()
        steps = np.array([1 / factor, 1.0, factor])
        for step in steps.tolist() if third else [1.0]:
            yield Prices(gpu * steps, ram * steps, third * step)

    def _look(self, prices: Prices) -> None:
        """Evaluate all bounds at prices (every pair of those of the two memories)."""
        there = self._at(prices)
        shape = self.best.shape
        flat = there.reshape(-1, *shape)
        which = flat.argmax(axis=0)
        value = np.take_along_axis(flat, which[None], axis=0)[0]
        better = value > self.best
        self.best = np.where(better, value, self.best)
        now = np.stack(
            [
                prices.gpu[which // len(prices.ram)],
                prices.ram[which % len(prices.ram)],
                np.full(shape, prices.third),
            ]
        )
        self.at = np.where(better, now, self.at)

    def _at(self, prices: Prices) -> FloatArray:
        """Return (prices of GPUs, prices of RAM, Z, C) bounds."""
        own = self.layers
        n = len(own.waiting)
        rest_gpu, moved_gpu = by_layer(own, self.gpu, prices.gpu, prices.third)
        rest_ram, _ = by_layer(own, self.ram, prices.ram, prices.third)
        moved_ram = self._moved(prices)
        waits = self.wait[0] + prices.third * self.wait[1]
        whole = (moved_gpu + rest_gpu)[:, None, None]
        on_gpu = np.minimum(moved_gpu[:, None, None], (moved_ram + waits)[None])
        on_gpu = on_gpu + rest_gpu[:, None, None]
        in_ram = rest_ram[:, None] + moved_ram
        counts = np.array([c.n_layers for c in own.counts])
        after = sums(on_gpu[..., ::-1])[..., n - counts]
        if not (moves := np.array([c.moves for c in own.counts])).all():
            after = np.where(moves, after, sums(whole[..., ::-1])[..., n - counts])
        before = sums(in_ram)[..., counts]
        value = after + before[None]
        apart = {id(o): outside_cost(o, prices) for o in self.outside}
        value = value + np.stack([apart[id(o)] for o in self.outside], axis=-1)[:, :, None]
        value = value - prices.gpu[:, None, None, None] * own.gpu.T
        value = value - prices.ram[None, :, None, None] * own.ram.T
        if self.room is not None:
            value = value - prices.third * self.room
        return np.asarray(value)

    def _moved(self, prices: Prices) -> FloatArray:
        """Return (prices of RAM, Z, blocks) least priced cost of experts in RAM up to each level.

        With the types in order of level the least up to a level is a running minimum.
        """
        own, n = self.layers, len(self.layers.waiting)
        groups = np.nonzero(own.movable)[0]
        level, cost = own.level[groups], self.ram.cost[groups]
        order = np.argsort(level, axis=1, kind="stable")
        upto = (level[:, :, None] <= own.highest).sum(axis=1) - 1
        base = np.take_along_axis(cost + prices.third * self.ram.third[groups], order, axis=1)
        n_bytes = np.take_along_axis(own.n_bytes[groups], order, axis=1)
        moved = np.zeros((len(prices.ram), len(own.highest), n))
        for i, price in enumerate(prices.ram):
            least = np.minimum.accumulate(base + price * n_bytes, axis=1)
            there = np.where(upto >= 0, np.take_along_axis(least, upto.clip(0), axis=1), np.inf)
            for z, each in enumerate(there.T):
                moved[i, z] = np.bincount(own.layer[groups], each, n)
        return moved

    def _steepest(self, use: FloatArray) -> float:
        """Return a price of a unit of `use` at which every group takes least of it."""
        both = np.concatenate([self.gpu.cost, self.ram.cost], axis=1)
        lowest = np.where(np.isfinite(both), both, np.inf).min(axis=1)
        span = np.where(np.isfinite(both), both, -np.inf).max(axis=1) - lowest
        most = use.max(axis=1)
        some = (most > 0) & np.isfinite(span)
        return _STEEP * float((span[some] / most[some]).max(initial=0.0)) or 1.0


def by_layer(
    layers: Layers, side: Side, memory: FloatArray, third: float
) -> tuple[FloatArray, FloatArray]:
    """Return (prices, blocks) least priced cost of what stays with its layer and what moves."""
    base = side.cost + third * side.third
    n = len(layers.waiting)
    rest, moved = np.zeros((len(memory), n)), np.zeros((len(memory), n))
    for i, price in enumerate(memory):
        least = (base + price * layers.n_bytes).min(axis=1)
        rest[i] = np.bincount(layers.layer, np.where(layers.movable, 0.0, least), n)
        moved[i] = np.bincount(layers.layer, np.where(layers.movable, least, 0.0), n)
    return rest, moved


def ram_side(bounds: Bounds, z: int) -> Side:
    """Return the layers' groups in RAM, their experts up to level `z` only."""
    allowed = bounds.layers.level <= bounds.layers.highest[z]
    return Side(np.where(allowed, bounds.ram.cost, np.inf), bounds.ram.third)


def _side(
    allowed: NDArray[np.bool_], damage: FloatArray, seconds: FloatArray, is_damage: bool
) -> Side:
    cost, third = (damage, seconds) if is_damage else (seconds, damage)
    return Side(np.where(allowed, cost, np.inf), np.where(allowed, third, 0.0))


def _outside(choices: Choices, n_blocks: int, is_damage: bool) -> _Outside:
    """Return what lies outside the layers, under the placement of `choices`."""
    groups = choices.groups
    rows = [g for g in range(len(groups)) if not _inside(choices, groups[g].members[0], n_blocks)]
    cost, third = choices.damage[rows], choices.seconds[rows]
    if not is_damage:
        cost, third = third, cost
    use = choices.use[:, rows]
    third = np.where(np.isfinite(third), third, 0.0)
    return _Outside(cost, use[:-1].sum(axis=0), use[-1], third)


def outside_cost(outside: _Outside, prices: Prices) -> FloatArray:
    """Return (prices of GPUs, prices of RAM) least priced cost outside the layers."""
    gpu = prices.gpu[:, None, None, None] * outside.gpu
    ram = prices.ram[:, None, None] * outside.ram
    priced = outside.cost + prices.third * outside.third + gpu + ram
    total: FloatArray = priced.min(axis=-1).sum(axis=-1)
    return total


def _inside(choices: Choices, member: int, n_blocks: int) -> bool:
    layer = choices.model.tensors[member].layer
    return layer is not None and layer < n_blocks


def sums(values: FloatArray) -> FloatArray:
    """Return the sums of the first 0, 1, … n values of the last axis, (…, n + 1)."""
    nothing = np.zeros((*values.shape[:-1], 1))
    return np.concatenate([nothing, np.cumsum(values, axis=-1)], axis=-1)


def _grid(top: float, factor: float) -> FloatArray:
    """Return prices from 0 to `top`, those above 0 a factor apart."""
    n = int(np.ceil(_DECADES / np.log10(factor)))
    return np.concatenate([[0.0], top / factor ** np.arange(n, -1.0, -1.0)])


def _levels(counts: Sequence[Count], sizes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the ranges of the largest expert tensor in RAM, (Z,) low and high ends."""
    highest = float(sizes.max(initial=0.0))
    buffers = [m for c in counts for some in c.memory for m in some]
    if not any(r.coefficient for m in buffers for r in m.compute):
        return np.zeros(1), np.array([highest])
    each = np.unique(np.concatenate([[0.0], sizes]))
    parts = np.array_split(each[1:], min(_MOST_LEVELS, len(each) - 1)) if len(each) > 1 else []
    parts = [each[:1], *parts]
    return np.array([p[0] for p in parts]), np.array([p[-1] for p in parts])


def _room(rig: Rig, count: Count, level: float) -> tuple[float, float]:
    """Return the bytes that all GPUs, and RAM, have for weights at most."""
    left = [
        float(
            (device.capacity_bytes or 0) - min(a.fixed_bytes(int(level)), b.fixed_bytes(int(level)))
        )
        for device, a, b in zip(rig.devices, *count.memory, strict=True)
    ]
    return sum(left[:-1]), left[-1]
