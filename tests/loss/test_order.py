"""The order of the types of one family, whatever single rows of a model say."""

from __future__ import annotations

import numpy as np
import pytest

from quantmix.ggml.types import get, table
from quantmix.loss import features, order, response
from quantmix.loss.predictor import FittedModel

from .conftest import catalog_model


def _fitted(name: str) -> FittedModel:
    return FittedModel.of(catalog_model(name))


def test_one_row_does_not_turn_the_order_round() -> None:
    """DeepSeek-V2-Lite's rows say iq2_xxs is better than iq2_xs: no tensor gets that damage."""
    model, loss = catalog_model("deepseek-v2-lite"), _fitted("deepseek-v2-lite")
    raw = response.cell_gains(loss.posterior.theta)[0]
    column = features.columns()
    assert raw[column["iq2_xxs"]] < raw[column["iq2_xs"]]
    cells = loss.damage(model, [get("iq2_xxs"), get("iq2_xs"), get("iq2_s")])
    assert np.all(np.diff(cells, axis=1) <= 1e-15)
    assert cells.any()


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "glm-4.5-air", "llama-3-8b", "glm-5"])
def test_no_type_is_better_than_a_better_one_of_its_family(name: str) -> None:
    """Every family of a fitted model goes down from the most damage of the curve to the least."""
    gains = response.cell_gains(order.kept(_fitted(name).posterior))[0]
    assert len(order.ladders()) > 3
    for ladder in order.ladders():
        assert np.all(np.diff(gains[ladder]) <= 1e-12 * gains[ladder][1:])


def test_rows_that_agree_with_the_curve_are_left_alone() -> None:
    """Where nothing crosses, the parameters are those of the posterior."""
    posterior = _fitted("deepseek-r1-0528").posterior
    np.testing.assert_array_equal(order.kept(posterior), posterior.theta)


def test_types_that_cross_share_the_mean_of_what_is_known() -> None:
    """The precision-weighted mean of their corrections is kept, and nothing else moves."""
    posterior = _fitted("glm-4.5-air").posterior
    kept, first = order.kept(posterior), response.FIRST_TYPE
    moved = np.flatnonzero(kept != posterior.theta)
    names = [list(features.columns())[j - first] for j in moved]
    assert {"iq2_ks", "iq2_k"} <= set(names)
    weight = 1.0 / np.diag(posterior.covariance)[moved]
    assert weight @ kept[moved] == pytest.approx(weight @ posterior.theta[moved], abs=1e-9)


def test_ladders_hold_measured_types_of_one_family() -> None:
    """mxfp4, which nobody measured, pushes none."""
    names = list(features.columns())
    by_name = {t.name: t for t in table("ik").values()}
    assert "mxfp4" not in {names[j] for ladder in order.ladders() for j in ladder}
    for ladder in order.ladders():
        assert len({by_name[names[j]].family for j in ladder}) == 1
