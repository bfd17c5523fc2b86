"""Designs and measurements that the tests of pages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantmix import Budget
from quantmix.design import run
from quantmix.models.sources import load_model
from quantmix.options import Options
from quantmix.recipe import Recipe
from quantmix.report import data, pages
from quantmix.report.build import subject_of
from quantmix.report.data import Subject
from quantmix.store import Measurement

MODEL = "deepseek-v2-lite"


def measurement(recipe: Recipe, **changes) -> Measurement:
    """A made-up measurement of exactly this recipe, 1 % off its prediction."""
    q = recipe.quality
    values = {
        "model": "m",
        "mix": recipe.name,
        "data": recipe.name,
        "model_name": "unknown model",
        "file": f"/somewhere/{recipe.name}.gguf",
        "corpus": "c0ffee",
        "n_ctx": 512,
        "chunks": 40,
        "tokens": 20440,
        "engine": "ik",
        "build": "1",
        "ctk": "f16",
        "ctv": "f16",
        "tensor_bytes": recipe.size.tensor_bytes,
        "bpw": recipe.size.bpw,
        "ppl": 1.01 * q.ppl,
        "ppl_err": 0.05,
        "seconds": 1.0,
        "kld": 1.1 * q.damage,
        "kld_err": 0.001,
        "ln_ratio": q.ln_ppl_ratio + 0.01,
        "ln_ratio_err": 0.002,
        "base": "b",
        "same_top": 0.93,
        "predicted": {
            "damage": q.damage,
            "ln_ppl_ratio": q.ln_ppl_ratio,
            "ppl": q.ppl,
            "ppl_low": q.ppl_low,
            "ppl_high": q.ppl_high,
            "interval": q.interval,
            "holds": True,
        },
        "types": {t.name: t.type for t in recipe.tensors},
        "host": "h",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Measurement(**{**values, **changes})


@pytest.fixture(scope="session")
def recipes() -> list[Recipe]:
    """Three recipes of a small expert model: two devices, one device, a bare size."""
    model = load_model(MODEL)
    budgets = [
        Budget.from_size("3.2bpw"),
        Budget.from_vram("9G"),
        Budget.from_gpus("8G,6G", ram="16G"),
    ]
    return [run(model, b, Options()).recipe for b in budgets]


@pytest.fixture(scope="session")
def folder(recipes: list[Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes as folders below one place."""
    place = tmp_path_factory.mktemp("recipes")
    for r in recipes:
        r.save(place / r.name, figures=False)
    return place


@pytest.fixture(scope="session")
def subject(recipes: list[Recipe]) -> Subject:
    """The recipes with their frontier and two measurements."""
    stock = {"predicted": {}, "types": {t.name: "q4_K" for t in recipes[0].tensors}}
    measured = [
        measurement(recipes[0]),
        measurement(recipes[1], **stock, file="/elsewhere/stock-Q4_K.gguf"),
    ]
    return subject_of(recipes, measured, frontier=True)


@pytest.fixture(scope="session")
def documents(subject: Subject) -> dict[str, tuple[dict[str, Any], str]]:
    """The three documents with their pages, by kind."""
    made = (
        (data.design_document(subject), pages.design_page),
        (data.sweep_document([subject, subject]), pages.sweep_page),
        (data.compare_document(subject), pages.compare_page),
    )
    return {doc["kind"]: (doc, draw(doc)) for doc, draw in made}
