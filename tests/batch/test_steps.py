"""What the steps of one process share, and what they must not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantmix.batch.steps import Workshop
from quantmix.request import Request

PLAIN = Request("qwen3-0.6b", size="4bpw")


def test_budgets_of_one_model_share_its_loss_model() -> None:
    """The same model is not fitted again for every budget."""
    workshop = Workshop()
    first = workshop.loss(PLAIN, "digest")
    assert first is not None
    assert workshop.loss(replace(PLAIN, size="5bpw"), "digest") is first


@pytest.mark.parametrize("other", [{"own": True}, {"mtp": True}, {"measurements": "m.json"}])
def test_what_a_loss_model_depends_on_is_not_shared(other: dict[str, object]) -> None:
    """--own, --mtp and --measurements make a loss model of the request's own."""
    assert Workshop().loss(replace(PLAIN, **other), "digest") is None  # type: ignore[arg-type]
