"""What the pages show, as plain JSON values: every number on a page is looked up in here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quantmix.emit.figures import bits
from quantmix.emit.readme import mix_rows
from quantmix.errors import BadFile, QuantmixError, UsageError
from quantmix.ggml.types import FLOATS
from quantmix.models.catalog import is_known
from quantmix.units import GIB

if TYPE_CHECKING:
    from quantmix.frontier import Frontier
    from quantmix.models.model import Model
    from quantmix.recipe import PlannedTensor, Recipe
    from quantmix.store import Measurement

_MARGIN = 1.12  # how far the frontier is drawn beyond what is marked


@dataclass(frozen=True)
class Subject:
    """A model with everything known about it that a page may show."""

    model: Model | None
    frontier: Frontier | None
    recipes: tuple[Recipe, ...]
    measured: tuple[Measurement, ...]


def design_document(subject: Subject) -> dict[str, Any]:
    """Return the document of a design page; the first recipe is the subject."""
    recipe = subject.recipes[0]
    doc = recipe.to_json()
    del doc["tensors"]
    return {
        "kind": "design",
        "recipe": doc,
        "damage_by_role": damage_by_role(recipe),
        "map": type_runs(recipe),
        "section": section(subject),
    }


def sweep_document(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return the document of a sweep page: one section per model."""
    sections = []
    for subject in subjects:
        doc = section(subject)
        doc["composition"] = [composition(r) for r in subject.recipes]
        sections.append(doc)
    return {"kind": "sweep", "sections": sections}


def compare_document(subject: Subject) -> dict[str, Any]:
    """Return the document of a comparison of recipes of one model, the first is the reference.

    Raises:
        UsageError: fewer than two recipes, or recipes of different models.
    """
    recipes = subject.recipes
    if len(recipes) < 2:
        raise UsageError("a comparison needs two recipes or more")
    ids = dict.fromkeys(r.model.id for r in recipes)
    shapes = [{t.name: t.shape for t in r.tensors} for r in recipes]
    named = [i for i in ids if is_known(i)]
    if len(ids) > 1 and (len(named) > 1 or any(s != shapes[0] for s in shapes)):
        raise UsageError(f"these recipes are of different models: {', '.join(ids)}")
    first = {t.name: t.type for t in recipes[0].tensors}
    return {
        "kind": "compare",
        "section": section(subject),
        "devices": [r.to_json()["devices"] for r in recipes],
        "differing": [sum(first.get(t.name) != t.type for t in r.tensors) for r in recipes],
        "roles": role_table(recipes),
        "maps": [type_runs(r) for r in recipes],
        "composition": [composition(r) for r in recipes],
    }


def section(subject: Subject) -> dict[str, Any]:
    """Return what is known about one model: frontier, recipes, measurements, residuals."""
    recipe = subject.recipes[0] if subject.recipes else None
    bench, elsewhere = one_bench(subject.measured)
    rows = [_measured(m, subject.recipes) for m in bench]
    residuals = _residuals(subject, rows)
    if subject.model is not None:
        name = subject.model.display or subject.model.id
        model_id, weights = subject.model.id, subject.model.n_elements
    elif recipe is not None:
        name, model_id, weights = recipe.model.id, recipe.model.id, recipe.model.n_elements
    else:
        name = subject.measured[0].model_name if subject.measured else "unknown"
        model_id, weights = name, None
    return {
        "name": name,
        "id": model_id,
        "n_elements": weights,
        "frontier": subject.frontier.to_json() if subject.frontier else None,
        "recipes": [_recipe_row(r) for r in subject.recipes],
        "bench": _bench(bench[0]) if bench else None,
        "measured": rows,
        "measured_elsewhere": elsewhere,
        "residuals": residuals,
        "residuals_summary": _summary(residuals),
    }


def damage_by_role(recipe: Recipe) -> list[dict[str, Any]]:
    """Return per role its damage, bytes, and shares of both; largest damage first."""
    damage: dict[str, float] = defaultdict(float)
    n_bytes: dict[str, int] = defaultdict(int)
    types = {role: names for role, names, _ in mix_rows(recipe)}
    for t in recipe.tensors:
        if t.type in FLOATS:
            continue
        damage[t.role] += t.damage
        n_bytes[t.role] += t.bytes
    total, size = sum(damage.values()) or 1.0, recipe.size.tensor_bytes or 1
    rows = [
        {
            "role": role,
            "types": types.get(role, ""),
            "bytes": n_bytes[role],
            "damage": damage[role],
            "damage_share": damage[role] / total,
            "bytes_share": n_bytes[role] / size,
        }
        for role in damage
    ]
    return sorted(rows, key=lambda r: (-r["damage"], -r["bytes"], r["role"]))


def type_runs(recipe: Recipe) -> list[dict[str, Any]]:
    """Return runs of layers with one type, role by role; tensors outside the blocks last."""
    by_role: dict[str, list[PlannedTensor]] = defaultdict(list)
    for t in recipe.tensors:
        if t.type not in FLOATS:
            by_role[t.role].append(t)
    runs: list[dict[str, Any]] = []
    inside = [r for r in by_role if by_role[r][0].layer is not None]
    for role in (*inside, *(r for r in by_role if r not in inside)):
        for t in sorted(by_role[role], key=lambda t: -1 if t.layer is None else t.layer):
            last = runs[-1] if runs else None
            if (
                last is not None
                and t.layer is not None
                and (last["role"], last["type"], last["last"]) == (role, t.type, t.layer - 1)
                and last["bpw"] == bits(t)
            ):
                last["last"] = t.layer
                last["bytes"] += t.bytes
            else:
                runs.append(
                    {
                        "role": role,
                        "first": t.layer,
                        "last": t.layer,
                        "type": t.type,
                        "bpw": bits(t),
                        "bytes": t.bytes,
                    }
                )
    return runs


def composition(recipe: Recipe) -> dict[str, Any]:
    """Return bytes by type with bits per weight, fewest bits first."""
    parts = [
        {
            "type": name,
            "bytes": row["bytes"],
            "bpw": 8 * row["bytes"] / row["n_elements"],
            "share": row["bytes"] / recipe.size.tensor_bytes,
        }
        for name, row in recipe.types.items()
        if row["n_elements"]
    ]
    return {"name": recipe.name, "parts": sorted(parts, key=lambda p: (p["bpw"], p["type"]))}


def role_table(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return per role the bits per weight, bytes, damage and types of every recipe."""
    order = dict.fromkeys(
        t.role for r in recipes for t in r.tensors if t.type not in FLOATS
    )  # fmt: skip
    rows = []
    for role in order:
        cells = []
        for recipe in recipes:
            mine = [t for t in recipe.tensors if t.role == role and t.type not in FLOATS]
            n_bytes = sum(t.bytes for t in mine)
            weights = sum(t.n_elements for t in mine)
            counts: dict[str, int] = defaultdict(int)
            for t in mine:
                counts[t.type] += 1
            cells.append(
                {
                    "bpw": 8 * n_bytes / weights if weights else None,
                    "bytes": n_bytes,
                    "damage": sum(t.damage for t in mine),
                    "types": dict(sorted(counts.items(), key=lambda kv: -kv[1])),
                }
            )
        rows.append({"role": role, "cells": cells})
    return rows


def one_bench(rows: Sequence[Measurement]) -> tuple[list[Measurement], int]:
    """Return the largest set of comparable rows, newest per file, and how many lie outside.

    Comparable: the same corpus, context, chunks and base.
    """
    benches: dict[tuple[Any, ...], dict[str, Measurement]] = defaultdict(dict)
    for m in rows:
        benches[(m.corpus, m.n_ctx, m.chunks, m.base)][m.data] = m
    if not benches:
        return [], 0
    best = max(benches, key=lambda k: (len(benches[k]), k[2], str(k)))
    chosen = sorted(benches[best].values(), key=lambda m: (m.tensor_bytes, m.file))
    return chosen, sum(len(b) for k, b in benches.items() if k != best)


def belongs(m: Measurement, model_id: str, names: Iterable[str]) -> bool:
    """Whether a measured file is of this model: the same tensors, and no other known name."""
    from quantmix.loss.evidence import catalog_id

    return set(m.types) == set(names) and catalog_id(m.model_name) in (None, model_id)


def find_recipes(folder: Path) -> list[Recipe]:
    """Return the recipes below a folder, in order of their path.

    Raises:
        BadFile: there is none, or one cannot be read.
    """
    from quantmix.recipe import load

    files = sorted(folder.rglob("recipe.json")) if folder.is_dir() else []
    if not files:
        raise BadFile(f"{folder} holds no recipe: make one with `quantmix design MODEL --out DIR`")
    return [load(f) for f in files]


def frontier_for(
    model: Model, recipes: Sequence[Recipe], measured: Sequence[Measurement] = ()
) -> Frontier:
    """Return the frontier over the range that recipes, measurements and publications span."""
    from quantmix.frontier import frontier, sweep
    from quantmix.loss.evidence import of_model

    settings = recipes[0].settings if recipes else None
    swept = sweep(model, settings)
    sizes = [r.size.tensor_bytes for r in recipes] + [m.tensor_bytes for m in measured]
    for row in of_model(model):
        n = row.bpw * model.n_elements / 8 if row.bpw else (row.size_gib or 0) * GIB
        if 0 < n < 9 * model.n_elements / 8:
            sizes.append(int(n))
    low = int(min(sizes, default=swept.smallest_bytes) / _MARGIN)
    high = int(max(sizes, default=swept.largest_bytes) * _MARGIN)
    low, high = min(low, swept.largest_bytes), max(high, swept.smallest_bytes)
    return frontier(swept, low, high)


def _recipe_row(r: Recipe) -> dict[str, Any]:
    doc = r.to_json()
    check = r.check or {}
    return {
        "name": r.name,
        "budget": r.budget.get("label", ""),
        "engine": r.engine.name,
        "size": doc["size"],
        "quality": doc["quality"],
        "speed": doc["speed"],
        "optimality": {k: doc["optimality"][k] for k in ("status", "gap")},
        "settings": {k: doc["settings"][k] for k in ("ctx", "ctk", "ctv")},
        "tensors_compared": check.get("tensors_compared"),
        "checked_by": check.get("engine"),
    }


def _bench(m: Measurement) -> dict[str, Any]:
    return {
        "corpus_sha256": m.corpus,
        "n_ctx": m.n_ctx,
        "chunks": m.chunks,
        "tokens": m.tokens,
        "engine": m.engine,
    }


def _measured(m: Measurement, recipes: Sequence[Recipe]) -> dict[str, Any]:
    name = next(
        (r.name for r in recipes if {t.name: t.type for t in r.tensors} == dict(m.types)), None
    )
    predicted = dict(m.predicted)
    return {
        "label": name or Path(m.file).stem,
        "ours": bool(name or predicted),
        "tensor_bytes": m.tensor_bytes,
        "bpw": m.bpw,
        "ppl": m.ppl,
        "ppl_err": m.ppl_err,
        "ln_ppl_ratio": m.ln_ratio,
        "ln_ppl_ratio_err": m.ln_ratio_err,
        "kld": m.kld,
        "kld_err": m.kld_err,
        "same_top": m.same_top,
        "predicted": predicted or None,
    }


def _residuals(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return predictions beside measurements: of published mixes left out of the fit, and ours."""
    found = _left_out(subject.model) if subject.model is not None else []
    for row in rows:
        p = row["predicted"]
        if p and p.get("ppl") and p.get("ppl_low") and p.get("ppl_high"):
            found.append(
                _residual(
                    row["label"],
                    row["bpw"],
                    row["ppl"],
                    p["ppl"],
                    p["ppl_low"],
                    p["ppl_high"],
                    True,
                )
            )
    return sorted(found, key=lambda r: (r["bpw"], r["label"]))


def _left_out(model: Model) -> list[dict[str, Any]]:
    """Return leave-one-out predictions of the published mixes that are known tensor by tensor."""
    from quantmix.loss import backtest, cases, evidence

    try:
        found, _ = cases.gather(evidence.of_model(model))
    except QuantmixError:
        return []
    out = []
    for case in found:
        for o in backtest.leave_one_out(case, backtest.without(case.model.id)):
            measured, predicted, low, high = (
                math.exp(min(v, 50.0)) for v in (o.measured, o.predicted, o.low, o.high)
            )
            out.append(_residual(o.id, o.bpw, measured, predicted, low, high, ours=False))
    return out


def _residual(
    label: str, bpw: float, measured: float, predicted: float, low: float, high: float, ours: bool
) -> dict[str, Any]:
    return {
        "label": label,
        "ours": ours,
        "bpw": bpw,
        "measured": measured,
        "predicted": predicted,
        "low": low,
        "high": high,
        "residual": math.log(measured / predicted),
        "residual_low": math.log(low / predicted),
        "residual_high": math.log(high / predicted),
        "holds": low <= measured <= high,
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    return {
        "n": len(rows),
        "inside": sum(bool(r["holds"]) for r in rows),
        "median_error": median(abs(r["residual"]) for r in rows),
    }
