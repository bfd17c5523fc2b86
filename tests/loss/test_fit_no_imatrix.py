"""What a missing importance matrix costs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from quantmix.ggml.types import get
from quantmix.loss import curve, features, load
from quantmix.loss.fit import no_imatrix
from quantmix.loss.fit.no_imatrix import Pair
from quantmix.models.sources import load_model


def _pairs(by_type: dict[str, float], by_model: dict[str, float]) -> list[Pair]:
    return [Pair(m, t, a + b, 0.02) for m, b in by_model.items() for t, a in by_type.items()]


def test_the_fit_tells_types_from_models() -> None:
    """Factors built from types and models are found again, on their average model."""
    types = {"q2_K": 1.0, "q3_K": 0.5, "iq4_xs": 0.2}
    models = {"a": -0.3, "b": 0.0, "c": 0.1, "d": 0.2}
    rows = {r["type"]: r for r in no_imatrix.fit(_pairs(types, models))}
    for name, value in types.items():
        assert math.log(float(rows[name]["factor"])) == pytest.approx(value, abs=0.05)
        # A new model differs by what these models do.
        assert 0.15 < float(rows[name]["sd"]) < 0.5
        assert rows[name]["n_models"] == "4"
    assert float(rows["usual"]["sd"]) > float(rows["q3_K"]["sd"])


def test_no_type_gains_by_leaving_the_matrix_away() -> None:
    """A pair that came out better without counts as no difference."""
    rows = no_imatrix.fit(_pairs({"q6_K": -0.2}, {"a": 0.0, "b": 0.0}))
    assert {r["factor"] for r in rows} == {"1"}


def test_types_that_ignore_the_matrix_lose_nothing() -> None:
    """q8_0 and floats are rounded alike; a type nobody measured both ways is taken as usual."""
    assert curve.without_imatrix("q8_0").gain == 1.0
    assert curve.without_imatrix("bf16").gain == 1.0
    assert curve.without_imatrix("q2_K").gain > curve.without_imatrix("iq4_xs").gain > 1.0
    guessed = curve.without_imatrix("iq6_k")
    assert not guessed.measured
    assert guessed.gain > 1.0
    assert features.without_imatrix().min() == 1.0


def test_predictions_without_a_matrix_are_higher_and_less_sure() -> None:
    """Every type by its own factor; at q8_0 nothing changes."""
    model = load_model("qwen3-8b")
    with_, without = load(model), load(model, imatrix=False)
    types = [get(n, "ik") for n in ("q8_0", "q4_K", "q2_K")]
    ratio = without.damage(model, types).sum(axis=0) / with_.damage(model, types).sum(axis=0)
    assert ratio == pytest.approx([curve.without_imatrix(t.name).gain for t in types], rel=1e-6)
    mix = [types[1] if t.quantizable else None for t in model.tensors]
    one, other = with_.quality(model, mix), without.quality(model, mix)
    assert other.ln_ppl_ratio > one.ln_ppl_ratio

    def width(q: object) -> float:
        return float(np.log(q.ln_ppl_ratio_high / q.ln_ppl_ratio))  # type: ignore[attr-defined]

    assert width(other) > width(one)
    assert any("importance matrix" in w for w in other.warnings)
    assert not any("importance matrix" in w for w in one.warnings)


def test_own_measurements_name_known_types() -> None:
    """Every type of the shipped table is one that the curve knows."""
    file = Path(no_imatrix.__file__).with_name("no_imatrix_smollm2.csv")
    names = [line.split(",")[0] for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(names) > 20
    assert set(names) <= set(curve.measured())
