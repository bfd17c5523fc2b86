"""The loss model that designs use."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from quantmix import loss
from quantmix.ggml.types import default_palette, get
from quantmix.loss.predictor import FittedModel
from quantmix.models.model import Model
from quantmix.recipe import Quality

from .conftest import catalog_model


def _uniform(model: Model, name: str, **options: bool) -> Quality:
    mix = [get(name) if t.quantizable else None for t in model.tensors]
    return loss.load(model, **options).quality(model, mix)


def test_q8_0_is_the_best_of_the_default_palette_and_nothing_ties(r1: Model) -> None:
    """Every tensor prefers q8_0, and no two types of the palette cost the same."""
    types = default_palette("ik")
    cells = loss.load(r1).damage(r1, types)
    rows = np.array([t.quantizable for t in r1.tensors])
    assert {types[j].name for j in cells[rows].argmin(axis=1)} == {"q8_0"}
    assert all(len(set(row)) == len(types) for row in cells[rows])
    assert not cells[~rows].any()


def test_quality_damage_is_the_exact_sum_of_cells(r1: Model) -> None:
    """`quality.damage` is the float sum of the damage cells in tensor order."""
    loss_model = loss.load(r1)
    types = [get("iq3_k"), get("q6_K")]
    mix = [types[i % 2] if t.quantizable else None for i, t in enumerate(r1.tensors)]
    cells = loss_model.damage(r1, types)
    total = 0.0
    for i, q in enumerate(mix):
        total += 0.0 if q is None else float(cells[i, i % 2])
    assert loss_model.quality(r1, mix).damage == total


def test_ppl_follows_from_the_ratio_and_lies_in_its_interval() -> None:
    """ppl = base · e^ratio, between its bounds; the basis is named."""
    q = _uniform(catalog_model("deepseek-r1-0528"), "iq3_k")
    assert q.ppl is not None
    assert q.ppl_base == pytest.approx(3.2130)
    assert q.ppl == pytest.approx(q.ppl_base * math.exp(q.ln_ppl_ratio))
    assert q.ppl_low is not None
    assert q.ppl_high is not None
    assert q.ppl_low < q.ppl < q.ppl_high
    assert (q.basis, q.interval) == ("calibrated", 0.9)


def test_a_model_without_measurements_has_a_ratio_but_no_ppl() -> None:
    """No base, no perplexity; the basis is the prior and a warning says so."""
    q = _uniform(catalog_model("gemma-3-27b-it"), "iq4_k")
    assert q.ppl is None
    assert q.ln_ppl_ratio > 0.0
    assert q.basis == "prior"
    assert any("no measured mix" in w for w in q.warnings)


def test_an_unknown_base_does_not_blur_the_ratio() -> None:
    """At q8_0 the rise is known to a percent, whoever the base is: it cancels."""
    model = catalog_model("qwen3.5-9b")
    q8 = get("q8_0", "ik")
    quality = loss.load(model).quality(
        model, [q8 if t.quantizable else None for t in model.tensors]
    )
    assert quality.ppl is None
    assert -0.01 < quality.ln_ppl_ratio_low < quality.ln_ppl_ratio < quality.ln_ppl_ratio_high
    assert quality.ln_ppl_ratio_high < 0.01


def test_damage_of_r1_is_fast(r1: Model) -> None:
    """A thousand tensors by the default palette take less than 20 ms (best of ten)."""
    loss_model = loss.load(r1)
    types = default_palette("ik")
    best = 1.0
    for _ in range(10):
        start = time.perf_counter()
        loss_model.damage(r1, types)
        best = min(best, time.perf_counter() - start)
    assert best < 0.02


def test_without_an_imatrix_everything_is_worse(r1: Model) -> None:
    """The factor holds for damage and rise alike."""
    assert _uniform(r1, "iq4_ks", imatrix=False).damage > 1.1 * _uniform(r1, "iq4_ks").damage


def test_outside_the_trust_region_the_interval_widens_and_says_why(r1: Model) -> None:
    """At two bits there are warnings, and the interval is wide upwards."""
    good, bad = _uniform(r1, "iq4_ks"), _uniform(r1, "iq2_kt")
    assert not good.warnings
    assert any("bits per weight" in w for w in bad.warnings)
    assert bad.ln_ppl_ratio_high is not None
    assert bad.ln_ppl_ratio_low is not None
    up = bad.ln_ppl_ratio_high - bad.ln_ppl_ratio
    assert up > bad.ln_ppl_ratio - bad.ln_ppl_ratio_low


def test_types_that_were_never_measured_are_named(r1: Model) -> None:
    """A mix that rests on a guess says so."""
    q = _uniform(r1, "mxfp4")
    assert any("mxfp4 never measured" in w for w in q.warnings)


def test_a_low_bit_whole_is_more_than_its_parts(r1: Model) -> None:
    """The rise exceeds the damage more and more as bits fall."""
    excess = [
        q.ln_ppl_ratio / q.damage for q in (_uniform(r1, n) for n in ("q6_K", "iq3_k", "iq1_m"))
    ]
    assert 1.0 <= excess[0] < excess[1] < excess[2]


def test_the_type_of_the_source_costs_nothing() -> None:
    """Keeping a tensor as its source has it is no damage."""
    model = catalog_model("qwen3.5-0.8b")
    q = _uniform(model, model.tensors[0].source_type)
    assert q.damage == 0.0


def test_calibration_moves_the_prior_towards_what_was_published() -> None:
    """For R1-0528 the calibrated interval of iq3_k is much narrower than the prior's."""
    model = catalog_model("deepseek-r1-0528")
    mix = [get("iq3_k") if t.quantizable else None for t in model.tensors]
    calibrated = FittedModel.of(model).quality(model, mix)
    alone = FittedModel.of(model, measured=()).quality(model, mix)

    def width(q: Quality) -> float:
        return (q.ln_ppl_ratio_high or 0.0) - (q.ln_ppl_ratio_low or 0.0)

    assert alone.basis == "prior"
    assert width(calibrated) < 0.8 * width(alone)


def test_files_known_by_size_only_do_not_make_a_model_calibrated() -> None:
    """Kimi-K2.6 has six published files and no published mix: the prior speaks, and says so."""
    model = catalog_model("kimi-k2.6")
    loss = FittedModel.of(model)
    assert loss.bench.rows
    assert loss.basis == "prior"
    quality = loss.quality(model, [get("iq4_k") if t.quantizable else None for t in model.tensors])
    assert quality.basis == "prior"
    assert any("no measured mix" in w for w in quality.warnings)
