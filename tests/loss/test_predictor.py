"""The loss model that designs use."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantmix import loss
from quantmix.ggml.types import GgmlType, default_palette, get
from quantmix.loss import calibrate, evidence, features, prior, trust
from quantmix.loss.predictor import FittedModel
from quantmix.loss.quality import Quality
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model, Tensor
from quantmix.models.sources import load_model
from quantmix.predict import predict

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
    """Qwen3-235B's four files but one are known by size: without that one the prior speaks."""
    model = catalog_model("qwen3-235b-a22b")
    sizes = [r for r in evidence.of_model(model) if not r.mix]
    assert sizes
    loss = FittedModel.of(model, measured=sizes)
    assert loss.bench.rows
    assert loss.basis == "prior"
    quality = loss.quality(model, [get("iq4_k") if t.quantizable else None for t in model.tensors])
    assert quality.basis == "prior"
    assert any("no measured mix" in w for w in quality.warnings)


def test_experts_trained_in_four_bits_lose_nothing_at_q4_0() -> None:
    """Kimi-K2.6: the file with experts at q4_0 and all else at q8_0 is the base; iq4_k is not."""
    model = catalog_model("kimi-k2.6")
    loss = FittedModel.of(model)
    exact = [_experts(t, "q4_0", "q8_0") for t in model.tensors]
    other = [_experts(t, "iq4_k", "q8_0") for t in model.tensors]
    assert loss.quality(model, exact).ln_ppl_ratio < 0.001
    assert loss.quality(model, other).ln_ppl_ratio > 0.01
    assert loss.quality(model, exact).ppl == pytest.approx(1.8433, rel=1e-3)
    blind = FittedModel.of(model, imatrix=False)
    assert blind.quality(model, exact).ln_ppl_ratio > 0.01


def _experts(tensor: Tensor, experts: str, rest: str) -> GgmlType | None:
    if not tensor.quantizable:
        return None
    return get(experts if tensor.role.endswith("_exps") else rest)


def test_a_quantized_source_has_lost_something(tmp_path: Path) -> None:
    """A GGUF that is q4_K already is predicted like q4_K of the original, not like the original."""
    model = catalog_model("llama-3-8b")
    file = tmp_path / "l3.gguf"
    write_ghost(file, model, lambda t: "q4_K" if t.quantizable else t.source_type)
    stored = load_model(str(file))
    same = predict(stored, {t.name: "q4_K" for t in stored.tensors if t.quantizable}).quality
    kept = predict(stored, {"output.weight": "q4_K"}).quality
    expected = _uniform(model, "q4_K")
    assert same.ln_ppl_ratio == pytest.approx(expected.ln_ppl_ratio)
    assert kept.ln_ppl_ratio == pytest.approx(expected.ln_ppl_ratio)
    again = predict(stored, {t.name: "q6_K" for t in stored.tensors if t.quantizable}).quality
    assert any("quantized already (q4_K)" in w for w in again.warnings)
    assert not any("quantized already" in w for w in same.warnings)


def test_a_missing_base_does_not_blur_the_ratio_of_a_model_with_rows() -> None:
    """R1T2 has rows and no base: at q8_0 the ratio is as sure as where the base is known."""
    spans = []
    for name in ("deepseek-tng-r1t2-chimera", "deepseek-v3.1"):
        q = _uniform(catalog_model(name), "q8_0")
        spans.append((q.ln_ppl_ratio_high or 0.0) - (q.ln_ppl_ratio_low or 0.0))
    assert spans[0] < 1.5 * spans[1]


def test_a_missing_base_is_read_off_low_bit_rows_with_what_they_lost() -> None:
    """From files below 2 bits alone the base of R1-0528 comes out near the published one."""
    model = catalog_model("deepseek-r1-0528")
    low = [replace(r, base_ppl=None) for r in evidence.of_model(model) if (r.bpw or 9.0) < 2.0]
    other = replace(model, id="some-r1")
    bench = evidence.bench(other, prior.shares(other), low)
    assert not bench.base_known
    assert abs(bench.ln_base - math.log(3.2130)) < 1.645 * bench.ln_base_sd
    assert bench.ln_base < math.log(4.0)


@pytest.mark.parametrize("name", ["deepseek-r1-0528", "llama-3-8b", "kimi-k2-thinking"])
def test_more_rows_never_make_the_printed_interval_wider(name: str) -> None:
    """From no row over half of them to all, at four sizes, with the quantiles that are printed."""
    model = catalog_model(name)
    rows = [r for r in evidence.of_model(model) if r.mix and r.imatrix]
    for qtype in ("q8_0", "iq5_k", "iq4_xs", "iq3_k"):
        mix = [get(qtype) if t.quantizable else None for t in model.tensors]
        widths = []
        for some in ([], rows[::2], rows):
            q = FittedModel.of(model, measured=some).quality(model, mix)
            widths.append((q.ln_ppl_ratio_high or 0.0) - (q.ln_ppl_ratio_low or 0.0))
        assert widths[0] >= 0.98 * widths[1] >= 0.95 * widths[2], (qtype, widths)


def test_no_model_is_predicted_worse_than_guessing() -> None:
    """Point and both ends stay at or below the perplexity of a uniform guess."""
    model = catalog_model("qwen2.5-1.5b-instruct")
    q = _uniform(model, "iq1_s", imatrix=False)
    worst = model.hparams.n_vocab * 1.0001
    assert (q.ppl or 0.0) <= worst
    assert (q.ppl_high or 0.0) <= worst
    assert (q.ppl_low or 0.0) < (q.ppl or 0.0)


def test_the_factors_of_the_trust_region() -> None:
    """Below 2.3 bits and above 0.3 nats the upper half is 1.25 times as wide, each."""
    model = catalog_model("deepseek-r1")
    two = [get("iq2_kt") if t.quantizable else None for t in model.tensors]
    four = [get("iq4_kt") if t.quantizable else None for t in model.tensors]
    below, above = trust.weights_bpw(model, two), trust.weights_bpw(model, four)
    assert trust.widening(above, 0.1) == 1.0
    assert trust.widening(above, 0.4) == pytest.approx(1.25)
    assert trust.widening(below, 0.4) == pytest.approx(1.25**2)
    plain = FittedModel.of(model).of_features(
        features.of_types(model, FittedModel.of(model).share, two)
    )
    high = plain.interval(calibrate.hyper())[1]
    q = FittedModel.of(model).quality(model, two)
    assert q.ln_ppl_ratio_high == pytest.approx(
        plain.rise + (high - plain.ln_ppl) * trust.widening(below, q.damage)
    )


def _with(model: Model, kind: str, **roles: str) -> Quality:
    mix = [get(roles.get(t.role, kind)) if t.quantizable else None for t in model.tensors]
    return FittedModel.of(model).quality(model, mix)


def test_every_warning_says_what_it_is_about() -> None:
    """Low head (tied or not), high damage, many two-bit weights, types nobody measured."""
    tied, plain = catalog_model("qwen3-4b-instruct-2507"), catalog_model("llama-3-8b")
    r1 = catalog_model("deepseek-r1")
    said = {
        "token_embd below 4 bits": _with(tied, "q6_K", token_embd="iq2_xxs"),
        "output below 4 bits": _with(plain, "q6_K", output="iq3_xxs"),
        "is above 0.3": _with(plain, "iq1_m"),
        "at 2.5 bits or less": _with(r1, "q8_0", ffn_gate_exps="iq2_k", ffn_up_exps="iq2_k"),
        "mxfp4 never measured": _with(plain, "q6_K", output="mxfp4"),
    }
    for words, quality in said.items():
        assert any(words in w for w in quality.warnings), (words, quality.warnings)
    clean = _with(plain, "q6_K", token_embd="iq2_xxs")
    assert not any("token_embd below" in w for w in clean.warnings)


def test_kept_matrices_count_with_their_bits() -> None:
    """Four small tensors at two bits in an unquantized model are no two-bit model."""
    model = catalog_model("qwen3-8b")
    mix = [get("iq2_xxs") if t.role == "attn_k" and (t.layer or 0) < 4 else None
           for t in model.tensors]  # fmt: skip
    assert trust.weights_bpw(model, mix) > 15.0
    assert not any(
        "bits per weight" in w for w in FittedModel.of(model).quality(model, mix).warnings
    )
