"""From what lies on disk (recipes, a store of measurements) to the documents of the pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantmix.errors import BadFile, QuantmixError, UsageError
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.recipe import Recipe
from quantmix.recipe import load as load_recipe
from quantmix.report import data
from quantmix.report.data import Subject
from quantmix.store import Measurement, Store, default_path

_SQLITE = b"SQLite format 3\0"


def design(
    recipe: str | Path, *, db: str | Path | None = None, frontier: bool = True
) -> dict[str, Any]:
    """Return the document of the page of one recipe.

    Args:
        recipe: its folder or recipe.json.
        db: a store of measurements; the default store is read when there is one.
        frontier: whether to compute the model's frontier.

    Raises:
        BadFile: no recipe, or no store.
    """
    found = load_recipe(recipe)
    return data.design_document(subject_of([found], _measurements(db), frontier=frontier))


def compare(
    recipes: Sequence[str | Path], *, db: str | Path | None = None, frontier: bool = True
) -> dict[str, Any]:
    """Return the document of recipes side by side; arguments as in `design`.

    Raises:
        BadFile: no recipe, or no store.
        UsageError: fewer than two, or of different models.
    """
    found = [load_recipe(r) for r in recipes]
    return data.compare_document(subject_of(found, _measurements(db), frontier=frontier))


def sweep(
    place: str | Path,
    *,
    model: str | None = None,
    db: str | Path | None = None,
    frontier: bool = True,
) -> dict[str, Any]:
    """Return the document of a sweep, one section per model, largest model first.

    Args:
        place: a folder with recipes below it, or a store of measurements.
        model: only this model; for a store of an unlisted model, the file it was made from.
        db, frontier: as in `design`.

    Raises:
        BadFile: neither recipes nor measurements are there.
        UsageError: nothing of that model is there.
    """
    path = Path(place)
    recipes: list[Recipe] = []
    if path.is_file():
        if not _is_store(path):
            raise BadFile(f"{path} is neither a folder of recipes nor a store of measurements")
        measured = _measurements(path)
    else:
        recipes = data.find_recipes(path)
        measured = _measurements(db)
    wanted = load_model(model) if model else None
    if wanted is not None:
        recipes = [r for r in recipes if r.model.id == wanted.id]
    subjects = [
        subject_of(mine, measured, frontier=frontier, model=wanted) for mine in _by_model(recipes)
    ]
    if not recipes:
        subjects = _from_store(measured, wanted, frontier)
    if not subjects:
        of = f" of {wanted.id}" if wanted else ""
        raise UsageError(f"{place} holds no recipe and no measurement{of}")
    return data.sweep_document(subjects)


def _by_model(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    """Return recipes grouped by model, each group in order of size, largest model first."""
    groups: dict[str, list[Recipe]] = {}
    for r in recipes:
        groups.setdefault(r.model.id, []).append(r)
    ordered = sorted(groups.values(), key=lambda g: (-g[0].model.n_elements, g[0].model.id))
    return [sorted(g, key=lambda r: (r.size.tensor_bytes, r.name)) for g in ordered]


def _from_store(
    measured: Sequence[Measurement], wanted: Model | None, frontier: bool
) -> list[Subject]:
    """Return one subject per measured model, or only the wanted one."""
    if wanted is not None:
        names = wanted.by_name
        mine = tuple(m for m in measured if data.belongs(m, wanted.id, names))
        if not mine:
            return []
        curve = data.frontier_for(wanted, (), mine) if frontier else None
        return [Subject(wanted, curve, (), mine)]
    groups: dict[str, list[Measurement]] = {}
    for m in measured:
        groups.setdefault(m.model, []).append(m)
    return [Subject(None, None, (), tuple(g)) for g in groups.values()]


def subject_of(
    recipes: Sequence[Recipe],
    measured: Sequence[Measurement],
    *,
    frontier: bool,
    model: Model | None = None,
) -> Subject:
    """Return what is known about the model of `recipes`; without its header, no frontier."""
    first = recipes[0]
    model = model or _model_of(first)
    names = [t.name for t in first.tensors]
    mine = tuple(m for m in measured if data.belongs(m, first.model.id, names))
    curve = data.frontier_for(model, recipes, mine) if frontier and model is not None else None
    return Subject(model, curve, tuple(recipes), mine)


def _model_of(recipe: Recipe) -> Model | None:
    """Return the model a recipe was made for, None when its source is not here."""
    info = recipe.model
    spec = info.id if info.source == "catalog" else info.source
    try:
        return load_model(spec, layout=info.layout if info.source == "catalog" else None)
    except (QuantmixError, OSError):
        return None


def _measurements(db: str | Path | None) -> list[Measurement]:
    """Return the rows of a store; without one named, of the default store when it is there."""
    if db is None and not default_path().exists():
        return []
    if db is not None and not Path(db).exists():
        raise BadFile(f"no store of measurements at {db}: `quantmix verify --db` makes one")
    with Store(db) as store:
        return store.find()


def _is_store(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except OSError as err:
        raise BadFile(f"{path} cannot be read: {err.strerror}") from err
