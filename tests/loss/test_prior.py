"""The prior: shares of tensors."""

from __future__ import annotations

import numpy as np
import pytest

from quantmix.loss import prior
from quantmix.models.catalog import catalog
from quantmix.models.model import Model
from quantmix.models.sources import load_model


def test_shares_sum_to_one_and_lie_on_quantizable_tensors(r1: Model) -> None:
    """Shares are a distribution over what can be quantized."""
    share = prior.shares(r1)
    assert np.isclose(share.sum(), 1.0)
    for tensor, value in zip(r1.tensors, share, strict=True):
        assert (value > 0.0) == (tensor.quantizable and tensor.loaded)


def test_routed_experts_are_cheap_per_byte_and_the_head_is_dear(r1: Model) -> None:
    """Per weight the output matrix of R1 matters at least thirty times as much as its experts."""
    share = prior.shares(r1)
    per_weight = {
        t.role: s / t.n_elements for t, s in zip(r1.tensors, share, strict=True) if t.layer != 0
    }
    assert per_weight["output"] > 30 * per_weight["ffn_down_exps"]
    assert per_weight["ffn_down_shexp"] > 10 * per_weight["ffn_down_exps"]


def test_layout_does_not_change_how_much_attention_matters() -> None:
    """kv_b as one matrix, as k_b and v_b, or as both copies weigh the same in total."""
    parts = []
    for layout in ("split", "legacy", "ik"):
        model = load_model("deepseek-r1", layout=layout)
        share = prior.shares(model)
        mla = [s for t, s in zip(model.tensors, share, strict=True) if t.role in prior.MLA_COPIES]
        parts.append(sum(mla))
    assert np.allclose(parts, parts[0])


@pytest.mark.parametrize("name", [n for n in catalog() if not n.startswith("gpt-oss")])
def test_every_catalog_model_has_a_family_and_finite_shares(name: str) -> None:
    """No model of the catalog is left without a prior."""
    model = load_model(name)
    assert prior.family(model) in ("mla", "gqa", "dense", "hybrid", "hybrid_moe")
    assert np.isfinite(prior.shares(model)).all()
