"""KLD of a role from its weighted errors and a floor."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.ggml.types import get
from quantmix.loss import role_damage
from quantmix.loss.role_damage import FINE_ACTIVATIONS, RoleDamage
from quantmix.measurements import Measurements, Probe, TensorError
from quantmix.models.model import Model

from .conftest import catalog_model

ERRORS = {
    "iq2_ks": 0.0895, "iq3_ks": 0.0208, "iq4_ks": 0.00475, "q4_K": 0.0046, "iq5_ks": 0.00116,
    "iq6_k": 0.00021, "q6_0": 0.00045, "q8_0": 0.00004,
}  # fmt: skip


@pytest.fixture(scope="module")
def smol() -> Model:
    """SmolLM2-135M."""
    return catalog_model("smollm2-135m")


def _kld(name: str, slope: float, coarse: float, fine: float) -> float:
    return slope * ERRORS[name] + (fine if name in FINE_ACTIVATIONS else coarse)


def _probe(role: str, name: str, kld: float, tokens: int = 2040) -> Probe:
    return Probe(
        "role", role, (), name, kld, 0.02 * kld, kld, 0.02 * kld, ERRORS[name], 1, 1.0, 0, tokens
    )


def _measured(*probes: Probe) -> Measurements:
    return Measurements(
        model="m", model_name="m", base="b", engine="ik", corpus="c", imatrix="i", n_ctx=512,
        chunks=8, tokens=2040, ppl_base=25.4, noise_floor=0.0, probes=probes,
    )  # fmt: skip


def _fit(model: Model, measured: Measurements) -> dict[str, RoleDamage]:
    by_role: dict[str, list[Probe]] = {}
    for p in measured.probes:
        by_role.setdefault(p.role, []).append(p)
    return role_damage.fit(model, by_role, measured)


@settings(max_examples=10, deadline=None)
@given(
    st.floats(0.5, 50.0),
    st.floats(2e-4, 1.5e-3),
    st.floats(0.1, 0.5),
    st.sampled_from(["q4_K", "iq3_ks", "iq5_ks"]),
)
def test_types_left_out_are_predicted(
    slope: float, coarse: float, fine: float, left_out: str
) -> None:
    """What follows the law is found: every type within 6 %, one that was not probed included."""
    smol = catalog_model("smollm2-135m")
    truth = {n: _kld(n, slope, slope * coarse, slope * coarse * fine) for n in ERRORS}
    measured = _measured(*(_probe("ffn_up", n, k) for n, k in truth.items() if n != left_out))
    tensor = next(t.name for t in smol.tensors if t.role == "ffn_up")
    rows = tuple(TensorError(tensor, n, 2 * e) for n, e in ERRORS.items())
    found = _fit(smol, replace(measured, errors=rows))["ffn_up"]
    for name, kld in truth.items():
        assert found.at([get(name)])[0] == pytest.approx(kld, rel=0.06), name


def test_bits_do_not_lower_the_floor(smol: Model) -> None:
    """Above five bits a type with fine activations beats one whose weights are closer."""
    probes = [_probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.0006)) for n in ERRORS]
    found = _fit(smol, _measured(*probes))["ffn_up"]
    coarse, fine = found.at([get("iq6_k"), get("q6_0")])
    assert ERRORS["iq6_k"] < ERRORS["q6_0"]
    assert fine < 0.7 * coarse


def test_less_text_is_brought_to_the_level_of_the_longest(smol: Model) -> None:
    """Probes on half the text that all read 20 % lower do not lower what is predicted."""
    truth = {n: _kld(n, 4.2, 0.003, 0.0006) for n in ERRORS}
    long = [_probe(r, n, truth[n]) for r in ("ffn_up", "attn_v") for n in ("q4_K", "iq3_ks")]
    short = [
        _probe(r, n, 0.8 * k, 1020)
        for r in ("ffn_up", "attn_v")
        for n, k in truth.items()
        if n not in ("q4_K", "iq3_ks")
    ]
    found = _fit(smol, _measured(*long, *short))
    for role in ("ffn_up", "attn_v"):
        assert found[role].at([get("iq4_ks")])[0] == pytest.approx(truth["iq4_ks"], rel=0.06)


def test_a_probed_type_keeps_its_own_deviation_when_sure(smol: Model) -> None:
    """A type 15 % off the law is believed when measured well, not when measured badly."""
    kept = []
    for noise in (0.001, 0.5):
        probes = []
        for n in ERRORS:
            p = _probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.0006) * (1.15 if n == "q4_K" else 1.0))
            probes.append(replace(p, kld_err=noise * p.kld) if n == "q4_K" else p)
        found = _fit(smol, _measured(*probes))["ffn_up"]
        kept.append(found.at([get("q4_K")])[0] / _kld("q4_K", 4.2, 0.003, 0.0006))
    assert kept[0] == pytest.approx(1.15, abs=0.02)
    assert kept[1] < 1.03


def test_a_probed_interleaved_type_keeps_its_own_deviation_too(smol: Model) -> None:
    """iq5_ks_r4 holds the weights of iq5_ks: what a probe of it shows counts for both."""
    kept = []
    for name in ("iq5_ks", "iq5_ks_r4"):
        truth = _kld("iq5_ks", 4.2, 0.003, 0.003) * 1.15
        probes = [_probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.003)) for n in ("iq3_ks", "iq4_ks")]
        probes.append(replace(_probe("ffn_up", "iq5_ks", truth), type=name, kld_err=1e-3 * truth))
        kept.append(_fit(smol, _measured(*probes))["ffn_up"].at([get(name)])[0] / truth)
    assert kept == pytest.approx([1.0, 1.0], abs=0.02)


def test_an_unknown_error_lies_between_its_neighbours(smol: Model) -> None:
    """Without an error of its own, iq3_k lies between iq4_ks and iq3_ks on the type curve."""
    probes = [_probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.0006)) for n in ("iq3_ks", "iq4_ks")]
    found = _fit(smol, _measured(*probes))["ffn_up"]
    assert ERRORS["iq4_ks"] < found.error(get("iq3_k")) < ERRORS["iq3_ks"]


def test_a_probed_type_that_loses_nothing_scales_no_errors(smol: Model) -> None:
    """bf16 of a bf16 source has an error of zero, which is no unit for the errors of others."""
    probes = [_probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.0006)) for n in ("iq3_ks", "iq4_ks")]
    probes.append(replace(_probe("ffn_up", "q8_0", 1e-9), type="bf16", err=0.0))
    tensor = next(t.name for t in smol.tensors if t.role == "ffn_up")
    errors = {"bf16": 0.0, "iq4_ks": ERRORS["iq4_ks"], "iq5_ks": ERRORS["iq5_ks"]}
    rows = tuple(TensorError(tensor, n, e) for n, e in errors.items())
    found = _fit(smol, replace(_measured(*probes), errors=rows))["ffn_up"]
    assert found.error(get("iq5_ks")) == pytest.approx(ERRORS["iq5_ks"])


def test_interleaving_changes_no_weights(smol: Model) -> None:
    """q8_k_r8 and q6_k_r4 round activations otherwise, which is not the error of the weights."""
    probes = [_probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.0006)) for n in ("iq3_ks", "q8_0")]
    found = _fit(smol, _measured(*probes))["ffn_up"]
    for name, base in (("q8_k_r8", "q8_0"), ("q6_k_r4", "q6_K"), ("iq3_ks", "iq3_ks")):
        assert found.error(get(name)) == found.error(get(base))


def test_beyond_the_worst_probed_type_it_is_steeper_and_said(smol: Model) -> None:
    """iq2_ks with iq3_ks as the worst probed: more than in proportion to its error, and outside."""
    probes = [_probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.0006)) for n in ("iq3_ks", "iq4_ks")]
    tensor = next(t.name for t in smol.tensors if t.role == "ffn_up")
    rows = tuple(TensorError(tensor, n, ERRORS[n]) for n in ("iq2_ks", "iq3_ks"))
    found = _fit(smol, replace(_measured(*probes), errors=rows))["ffn_up"]
    assert found.outside(get("iq2_ks"))
    assert not found.outside(get("iq3_ks"))
    worst, beyond = found.at([get("iq3_ks"), get("iq2_ks")])
    assert math.log(beyond / worst) > math.log(ERRORS["iq2_ks"] / ERRORS["iq3_ks"])
    assert np.isfinite(beyond)


def test_unquantized_types_have_no_floor(smol: Model) -> None:
    """f16 costs next to nothing and f32 nothing."""
    probes = [_probe("ffn_up", n, _kld(n, 4.2, 0.003, 0.0006)) for n in ("iq3_ks", "iq6_k")]
    half, full = _fit(smol, _measured(*probes))["ffn_up"].at([get("f16"), get("f32")])
    assert half < 1e-5
    assert full == 0.0


@pytest.mark.engine
def test_the_table_of_fine_activations_is_the_engines() -> None:
    """The engine's own type traits say with which activations each type is multiplied."""
    from quantmix.engine import native
    from quantmix.ggml.types import table

    lib = native.load()
    blocks = {t.id: t.name for t in table("ik").values()}
    mine = set()
    for t in table("ik").values():
        if t.is_quantized and t.writable:
            partner = lib.ggml_internal_get_type_traits(t.id).vec_dot_type
            if blocks.get(partner) in ("q8_2_x4", "q8_K32"):
                mine.add(t.name)
    assert mine == FINE_ACTIVATIONS
