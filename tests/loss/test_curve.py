"""The type curve."""

from __future__ import annotations

import pytest

from quantmix.ggml.types import default_palette, get, table
from quantmix.loss import curve


@pytest.mark.parametrize("engine", ["ik", "mainline"])
def test_every_type_has_a_gain_and_repacking_changes_nothing(engine: str) -> None:
    """No type is without a number; interleaved ones equal their base, but four."""
    types = table(engine)  # type: ignore[arg-type]
    for t in types.values():
        g = curve.gain(t)
        assert g.gain >= 0.0
        assert g.sd >= 0.0
        if t.name not in curve.OWN_CURVE:
            assert g == curve.gain(types[t.base])


def test_q8_0_is_the_best_of_the_default_palette() -> None:
    """Nothing in the palette beats q8_0, and no two types tie."""
    gains = {t.name: curve.gain(t).gain for t in default_palette("ik")}
    assert min(gains, key=lambda n: gains[n]) == "q8_0"
    assert len(set(gains.values())) == len(gains)


def test_floats_cost_next_to_nothing_but_not_the_same() -> None:
    """f32 costs nothing, bf16 and f16 a millionth of iq4_k."""
    assert curve.gain(get("f32")).gain == 0.0
    assert 0.0 < curve.gain(get("bf16")).gain < curve.gain(get("f16")).gain < 1e-5


def test_an_unmeasured_type_is_never_better_than_measured_ones_of_its_size() -> None:
    """mxfp4 has no sweep: it is worse than every measured type of at least as many bits."""
    guess = curve.gain(get("mxfp4"))
    assert not guess.measured
    bigger = [t for t in default_palette("ik") if t.name in curve.measured() and t.bpw >= 4.25]
    assert all(guess.gain > curve.gain(t).gain for t in bigger)


def test_the_reference_is_one() -> None:
    """Gains are relative to iq4_k."""
    assert curve.gain(get("iq4_k")).gain == 1.0


def test_eight_bits_with_one_scale_a_row_are_not_eight_bits() -> None:
    """q8_KV was measured near iq4_k on four models; q8_k_r8 and q6_k_r4 stay close to six bits."""
    assert 0.3 < curve.gain(get("q8_KV")).gain < 1.2
    assert curve.gain(get("q8_KV")).measured
    assert curve.gain(get("q8_KV_r8")) == curve.gain(get("q8_KV"))
    for name in ("q8_k_r8", "q6_k_r4"):
        assert curve.gain(get("q8_0")).gain < curve.gain(get(name)).gain < 0.3
