"""Calibration on measured rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantmix.loss import calibrate, features, prior, response
from quantmix.loss.calibrate import Row
from quantmix.models.model import Model

from .conftest import catalog_model

TYPES = ("q6_K", "iq5_k", "iq4_ks", "iq3_k", "iq3_xxs", "iq2_k", "iq2_kt", "iq1_m")


def _rows(model: Model, ln_scale: float, noise: float = 0.0, n: int = len(TYPES)) -> list[Row]:
    """Uniform mixes of a model whose true scale is `ln_scale`, base ln PPL 1."""
    share = prior.shares(model)
    theta = _known(model).mean.copy()
    theta[response.SCALE] = ln_scale
    rng = np.random.default_rng(3)
    rows = []
    for name in TYPES[:n]:
        w = features.of_types(model, share, [name if s > 0 else None for s in share])
        y = float(response.respond(theta, w[None], calibrate.hyper().power).ln_ppl[0])
        rows.append(Row(name, w, y + noise * float(rng.normal()), 4.0))
    return rows


def _known(model: Model) -> calibrate.Prior:
    return calibrate.prior(1.0, 0.0005, model.n_elements, prior.scale_law(model))


def test_without_rows_the_posterior_is_the_prior(r1: Model) -> None:
    """No evidence changes nothing."""
    known = _known(r1)
    posterior = calibrate.fit([], known)
    assert np.array_equal(posterior.theta, known.mean)
    assert np.allclose(np.sqrt(np.diag(posterior.covariance)), known.sd)


def test_the_scale_of_a_model_is_found(r1: Model) -> None:
    """Rows of a model twice as fragile as the prior says move predictions to where they belong."""
    true = float(_known(r1).mean[response.SCALE]) + 0.7
    rows = _rows(r1, true, noise=0.0005)
    posterior = calibrate.fit(rows[:3] + rows[4:], _known(r1))
    p = calibrate.predict(posterior, rows[3].w)
    assert abs(p.ln_ppl - rows[3].ln_ppl) < 0.01
    before = calibrate.predict(calibrate.fit([], _known(r1)), rows[3].w)
    assert abs(before.ln_ppl - rows[3].ln_ppl) > 0.03


def test_more_evidence_means_a_narrower_interval(r1: Model) -> None:
    """Each doubling of the rows shrinks the interval."""
    scale = float(_known(r1).mean[response.SCALE])
    rows = _rows(r1, scale)
    widths = []
    for n in (0, 2, 4, 8):
        p = calibrate.predict(calibrate.fit(rows[:n], _known(r1)), rows[3].w)
        low, high = p.bounds((1.645, 1.645))
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_one_broken_row_does_not_bend_the_fit(r1: Model) -> None:
    """A row off by 50 % in PPL moves the others' predictions by less than one percent."""
    scale = float(_known(r1).mean[response.SCALE])
    rows = _rows(r1, scale)
    broken = [replace(rows[2], ln_ppl=rows[2].ln_ppl + 0.4), *rows[3:], *rows[:2]]
    p = calibrate.predict(calibrate.fit(broken, _known(r1)), rows[3].w)
    assert abs(p.ln_ppl - rows[3].ln_ppl) < 0.01


def test_rows_known_by_size_say_less_than_exact_ones(r1: Model) -> None:
    """The same rows as sizes leave a wider interval than as mixes."""
    rows = _rows(r1, float(_known(r1).mean[response.SCALE]))
    loose = [replace(r, exact=False) for r in rows]
    exact_sd = calibrate.predict(calibrate.fit(rows, _known(r1)), rows[3].w).sd
    loose_sd = calibrate.predict(calibrate.fit(loose, _known(r1)), rows[3].w).sd
    assert exact_sd < loose_sd


def test_small_dense_models_lose_more() -> None:
    """The prior scale grows as a dense model shrinks, not as a sparse one does."""
    h = calibrate.hyper()

    def scales(law: str) -> list[float]:
        return [calibrate.ln_scale_prior(n, law, h)[0] for n in (27 * 10**9, 75 * 10**7)]

    large, small_one = scales("hybrid")
    assert small_one > large + 1.0
    large, small_one = scales("dense")
    assert small_one > large + 0.3
    assert len(set(scales("sparse"))) == 1


def test_hybrid_models_are_known_more_closely_than_dense_ones() -> None:
    """Their scale follows size; that of pure attention models scatters."""
    h = calibrate.hyper()
    hybrid, dense = (calibrate.ln_scale_prior(27 * 10**9, f, h) for f in ("hybrid", "dense"))
    assert hybrid[0] < dense[0] - 0.5
    assert hybrid[1] < 0.6 * dense[1]


@pytest.mark.parametrize("without", ["deepseek-r1-0528", "no-such-model"])
def test_hyper_parameters_exist_without_each_model(without: str) -> None:
    """A model that was never used has the common ones."""
    h = calibrate.hyper(without)
    assert h.quantiles[0] > 1.0
    assert (h == calibrate.hyper()) == (without == "no-such-model")


@pytest.mark.parametrize(("times", "low", "high"), [(1.0, 1.0, 1.3), (6.0, 1.6, 3.0)])
def test_rows_that_scatter_more_than_their_noise_widen_the_interval(
    r1: Model, times: float, low: float, high: float
) -> None:
    """Birge's ratio is near one for the noise expected, and well above for noisier rows.

    Eight rows and types that move one by one: the fit follows each row half way, so residuals in
    place alone would show next to nothing (1.1 at six times the noise).
    """
    h = calibrate.hyper()
    rows = _rows(r1, float(_known(r1).mean[response.SCALE]))
    rng = np.random.default_rng(11)
    found = []
    for _ in range(30):
        noisy = []
        for row in rows:
            rise = np.array([row.ln_ppl - 1.0])
            sd = float(np.sqrt(calibrate.noise_variance(rise, np.array([True]), h)[0]))
            noisy.append(replace(row, ln_ppl=row.ln_ppl + times * sd * float(rng.normal())))
        found.append(calibrate.fit(noisy, _known(r1)).inflation)
    assert low <= float(np.median(found)) <= high


def test_the_law_of_size_follows_experts_first_and_only_one_hybrid_line() -> None:
    """Dense MLA is dense; hybrids of another maker are as uncertain as dense models."""
    laws = {m: prior.scale_law(catalog_model(m)) for m in ("deepseek-r1", "qwen3.5-4b", "qwen3-4b")}
    assert laws == {"deepseek-r1": "sparse", "qwen3.5-4b": "hybrid", "qwen3-4b": "dense"}
    hybrid = catalog_model("qwen3.5-4b")
    assert prior.scale_law(replace(hybrid, arch="falcon-h1")) == "dense"
    dense = catalog_model("qwen3-4b")
    latent = replace(dense, hparams=replace(dense.hparams, kv_lora_rank=256))
    assert prior.family(latent) == "mla"
    assert prior.scale_law(latent) == "dense"
