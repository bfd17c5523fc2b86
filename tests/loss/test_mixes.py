"""Mixes as people publish them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.errors import UsageError
from quantmix.loss import mixes, prior
from quantmix.models.model import Model

from .conftest import catalog_model


def _of(model: Model, text: str) -> dict[str, dict[str, float]]:
    found = mixes.resolve(model, text)
    return {t.name: dict(c) for t, c in zip(model.tensors, found, strict=True) if c is not None}


def test_specific_keys_override_general_ones(r1: Model) -> None:
    """`ffn_down_exps` beats `ffn_exps`, which beats `rest`."""
    types = _of(r1, "rest=q8_0;ffn_exps=iq2_k_r4;ffn_down_exps=iq3_k_r4;shexp=iq5_ks")
    assert types["blk.9.ffn_down_exps.weight"] == {"iq3_k": 1.0}
    assert types["blk.9.ffn_up_exps.weight"] == {"iq2_k": 1.0}
    assert types["blk.9.ffn_up_shexp.weight"] == {"iq5_ks": 1.0}
    assert types["output.weight"] == {"q8_0": 1.0}


def test_layers_and_counts(r1: Model) -> None:
    """`type[3-8]` are those layers; `type*n` without layers become chances."""
    types = _of(r1, "all=q8_0;ffn_down_exps=q5_K[3-8]+iq4_xs;ffn_up_exps=iq3_k*20+iq2_k*38")
    assert types["blk.8.ffn_down_exps.weight"] == {"q5_K": 1.0}
    assert types["blk.9.ffn_down_exps.weight"] == {"iq4_xs": 1.0}
    chances = types["blk.9.ffn_up_exps.weight"]
    assert math.isclose(chances["iq3_k"], 20 / 58)
    assert math.isclose(sum(chances.values()), 1.0)


def test_keys_may_name_layers(r1: Model) -> None:
    """`attn[0-1]=…` holds for those layers only."""
    types = _of(r1, "all=iq4_ks;attn[0-1]=q8_0;attn=iq5_k")
    assert types["blk.1.attn_output.weight"] == {"q8_0": 1.0}
    assert types["blk.2.attn_output.weight"] == {"iq5_k": 1.0}


def test_what_stayed_large_may_be_left_out(r1: Model) -> None:
    """Dense layers and the head of R1 may go unmentioned, its experts may not."""
    share = prior.shares(r1)
    found = mixes.resolve(r1, "attn=q8_0;shexp=q8_0;ffn_exps=iq2_k", share)
    types = dict(zip([t.name for t in r1.tensors], found, strict=True))
    assert types["output.weight"] == {"q6_K": 1.0}
    with pytest.raises(UsageError, match="does not say"):
        mixes.resolve(r1, "attn=q8_0;shexp=q8_0;output=q8_0", share)


def test_recurrent_tensors_follow_attention(small: Model) -> None:
    """A mix of a hybrid that does not name ssm tensors means them like attn_qkv."""
    types = _of(small, "attn_qkv=iq3_k;ssm_alpha=q8_0;rest=iq4_k")
    assert types["blk.0.ssm_out.weight"] == {"iq3_k": 1.0}
    assert types["blk.0.ssm_alpha.weight"] == {"q8_0": 1.0}


@pytest.mark.parametrize("text", ["", "q8_0", "all=", "all=nope", "attn=q8_0", "ftype:IQ1_M"])
def test_what_is_no_complete_mix_is_refused(text: str, r1: Model) -> None:
    """Unknown types, broken items and mixes that leave tensors open are usage errors."""
    with pytest.raises(UsageError):
        mixes.resolve(r1, text)


@pytest.mark.parametrize("layers", ["-3", "3-", " ", "5-3", "1-2-3", ",", "0-99999999999"])
def test_layers_that_are_none_are_named(layers: str, small: Model) -> None:
    """A list of layers that is empty, open or turned round is a usage error that quotes it."""
    for text in (f"attn[{layers}]=q8_0;rest=q4_K", f"attn=q8_0[{layers}]+q6_K;rest=q4_K"):
        with pytest.raises(UsageError, match=rf"\[{layers}\] names no layers"):
            mixes.resolve(small, text)


@given(st.text(max_size=40))
def test_any_text_is_a_mix_or_a_usage_error(text: str) -> None:
    """The parser never fails otherwise, and chances always sum to one."""
    try:
        found = mixes.resolve(catalog_model("qwen3.5-0.8b"), text)
    except UsageError:
        return
    assert all(math.isclose(sum(c.values()), 1.0) for c in found if c is not None)
