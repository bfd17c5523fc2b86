"""Fits the sensitivity prior from per-tensor tables: role shares and their shape over depth.

From tables of ln PPL: what is predicted is ln PPL, and KLD of one tensor rates early layers higher.

Per table: subtract the noise floor, split cells that were measured as one group, cut outliers,
divide by the sum. The floor falls linearly with depth, because a disturbance of an early layer
has more layers left to grow in (expert flips); it is the 5 % quantile line of the cells. A table
without attention is put on the scale of the whole ones of its family.

    share of one tensor = S[family, role] / n_layer · shape(family, class of role, depth)
    shape(u) = exp(slope · u + bend · (u² - 1/3)) · e^first (first layer) · e^last (last layer)

with u from -1 (first layer) to 1 (last). Family values are shrunk towards the mean over families
by half a table; shape parameters towards zero by a ridge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import least_squares, linprog

from quantmix.errors import QuantmixError
from quantmix.loss import prior
from quantmix.loss.fit.tables import Sweep, TensorTable
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model
from quantmix.models.roles import split_name
from quantmix.models.sources import load_model

_FLOOR_QUANTILE: Final = 0.05
_OUTLIER: Final = 6.0
_SHRINK_TABLES: Final = 0.5
_RIDGE: Final = 0.3
# Sums to 14 nats over a floor of 0.05: its cells rank nothing.
_BROKEN: Final = frozenset({"GLM-4.7-Flash"})


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape over depth of one class of roles."""

    slope: float = 0.0
    bend: float = 0.0
    first: float = 0.0
    last: float = 0.0


@dataclass(frozen=True)
class SensitivityFit:
    """Shares by (family, role), shapes by (family, class), number of tables per family."""

    share: dict[tuple[str, str], float]
    shape: dict[tuple[str, str], Shape]
    n_tables: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Clean:
    family: str
    n_layer: int
    cells: Mapping[tuple[str, int | None], float]
    total: float


def anchors(tables: Sequence[TensorTable], sweeps: Sequence[Sweep]) -> list[tuple[float, float]]:
    """Return (sum of single-tensor KLD, whole-model KLD at the same type) of unrouted models."""
    whole = {s.model: s.kld for s in sweeps}
    out = []
    for raw in tables:
        clean = _clean(raw)
        kld = whole.get(raw.model, {}).get(raw.type)
        if clean is not None and clean.family in ("dense", "hybrid") and kld is not None:
            out.append((clean.total, kld))
    return out


def fit_sensitivity(tables: Sequence[TensorTable]) -> SensitivityFit:
    """Fit shares and shapes of every family that has a table."""
    clean = [c for c in map(_clean, tables) if c is not None]
    by_family: dict[str, list[_Clean]] = defaultdict(list)
    for c in clean:
        by_family[c.family].append(c)
    densities = {f: _whole([_densities(c) for c in cs]) for f, cs in by_family.items()}
    overall = _mean([d for ds in densities.values() for d in [_mean(ds)]])
    share = {}
    for fam, ds in densities.items():
        roles = sorted({r for d in ds for r in d})
        for role in roles:
            mine = [d[role] for d in ds if role in d]
            total = sum(mine) + _SHRINK_TABLES * overall[role]
            share[fam, role] = total / (len(mine) + _SHRINK_TABLES)
    for role, value in overall.items():
        share["any", role] = value
    shape = {}
    for fam, cs in by_family.items():
        for cls in prior.CLASSES:
            shape[fam, cls] = fit_shape([_profile(c, cls) for c in cs])
    for cls in prior.CLASSES:
        shape["any", cls] = fit_shape([_profile(c, cls) for c in clean])
    return SensitivityFit(share, shape, {f: len(cs) for f, cs in by_family.items()})


def _whole(densities: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Return densities on one scale: a table without attention cells is no whole model.

    Such a table is scaled so that its roles together weigh what they weigh on average in the
    whole tables of the family; where no table is whole, they stay as they are.
    """
    whole = [d for d in densities if any(r.startswith(("attn", "ssm")) for r in d)]
    if not whole:
        return list(densities)
    mean = _mean(whole)
    out: list[Mapping[str, float]] = []
    for d in densities:
        common = [r for r in d if r in mean]
        if d in whole or not common:
            out.append(d)
            continue
        factor = sum(mean[r] for r in common) / sum(d[r] for r in common)
        out.append({r: v * factor for r, v in d.items()})
    return out


def _mean(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    roles = sorted({r for p in parts for r in p})
    return {r: float(np.mean([p[r] for p in parts if r in p])) for r in roles}


def _clean(raw: TensorTable) -> _Clean | None:
    """Return floor-free, ungrouped cells that sum to one, or None when the table is of no use."""
    if raw.model in _BROKEN:
        return None
    try:
        model = load_model(raw.model)
    except QuantmixError:
        return None
    names = [n for n, v in raw.cells.items() if v is not None and _trunk(model, n)]
    if len(names) < 50:
        return None
    value = np.array([raw.cells[n] for n in names], dtype=np.float64)
    layers = [split_name(n)[1] for n in names]
    depth = np.array([-1.0 if x is None else x / (model.hparams.n_layer - 1) for x in layers])
    value = value - _floor(value, depth)
    group: dict[tuple[int, float], list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        if layer is not None:
            group[layer, raw.cells[names[i]] or 0.0].append(i)
    for members in group.values():
        value[members] /= len(members)
    cells = {(split_name(n)[0], x): float(v) for n, x, v in zip(names, layers, value, strict=True)}
    cells = _cut_outliers(cells, model.hparams.n_layer)
    if model.hparams.tied_embeddings:
        cells = {
            ("token_embd_tied" if r == "token_embd" else r, x): v for (r, x), v in cells.items()
        }
    total = sum(cells.values())
    return _Clean(
        prior.family(model),
        model.hparams.n_layer,
        {k: v / total for k, v in cells.items()},
        total,
    )


def _trunk(model: Model, name: str) -> bool:
    layer = split_name(name)[1]
    return layer is None or layer < model.hparams.n_layer


def _floor(value: FloatArray, depth: FloatArray) -> FloatArray:
    """Return the 5 % quantile line a + b · (1 - depth), b ≥ 0 (a alone outside the blocks)."""
    inside = depth >= 0.0
    y, x = value[inside], 1.0 - depth[inside]
    n = len(y)
    # Quantile regression as a linear programme: y = a + b x + up - down.
    cost = np.concatenate([[0, 0], np.full(n, _FLOOR_QUANTILE), np.full(n, 1 - _FLOOR_QUANTILE)])
    equal = np.hstack([np.ones((n, 1)), x[:, None], np.eye(n), -np.eye(n)])
    bounds = [(0, None), (0, None)] + [(0, None)] * (2 * n)
    a, b = linprog(cost, A_eq=equal, b_eq=y, bounds=bounds, method="highs").x[:2]
    return np.asarray(np.where(inside, a + b * (1.0 - depth), a))


def _cut_outliers(
    cells: dict[tuple[str, int | None], float], n_layer: int
) -> dict[tuple[str, int | None], float]:
    """Cut interior cells at six times their role's mean of the other layers."""
    out = dict(cells)
    roles = sorted({r for r, x in cells if x is not None})
    for role in roles:
        keys = [k for k in cells if k[0] == role and k[1] is not None]
        values = np.array([cells[k] for k in keys])
        limit = _OUTLIER * float(np.median(np.clip(values, 0.0, None)) + values.mean()) / 2
        for key in keys:
            if key[1] not in (0, n_layer - 1):
                out[key] = min(out[key], limit)
    return out


def _densities(c: _Clean) -> dict[str, float]:
    """Return per role the mean share of a tensor times the number of layers, at least 1e-4."""
    by_role: dict[str, list[float]] = defaultdict(list)
    outside: dict[str, float] = {}
    for (role, layer), value in c.cells.items():
        if layer is None:
            outside[role] = max(value, 1e-4)
        else:
            by_role[role].append(value)
    inside = {r: max(float(np.mean(v)) * c.n_layer, 1e-4) for r, v in by_role.items()}
    return {**inside, **outside}


def _profile(c: _Clean, cls: str) -> tuple[FloatArray, FloatArray]:
    """Return depth u and the cells of a class, each divided by the mean of its role."""
    u, v = [], []
    roles = sorted({r for r, x in c.cells if x is not None and prior.role_class(r) == cls})
    for role in roles:
        here = [(x, s) for (r, x), s in c.cells.items() if r == role and x is not None]
        mean = float(np.mean([s for _, s in here]))
        if len(here) >= 0.2 * c.n_layer and mean > 0.0:
            u += [2.0 * x / (c.n_layer - 1) - 1.0 for x, _ in here]
            v += [s / mean for _, s in here]
    return np.array(u), np.array(v)


def fit_shape(profiles: Sequence[tuple[FloatArray, FloatArray]]) -> Shape:
    """Return the shape of (depth, relative value) points of one class, ridge towards flat."""
    u = np.concatenate([p[0] for p in profiles])
    v = np.concatenate([p[1] for p in profiles])
    if len(u) < 8:
        return Shape()

    def residual(p: FloatArray) -> FloatArray:
        fitted = prior.depth_shape(u, p[0], p[1], p[2], p[3])
        return np.concatenate([(fitted / fitted.mean() - v), _RIDGE * np.sqrt(len(u)) * p])

    p = least_squares(residual, np.zeros(4), loss="soft_l1", f_scale=0.7).x
    return Shape(*map(float, p))
