"""The loss model that designs use: prior and published measurements in one posterior.

    damage(t, q) = share(t) · exp(k + r_group(t)) · gain_q^(1+e) · e^(d_q)        nats, additive
    ln(PPL/base) = D · (1 + (c · D)^P)                                            D = sum of damage

with the posterior means of `calibrate`. The interval carries parameters, form and low bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantmix.ggml.types import GgmlType
from quantmix.loss import (
    calibrate,
    curve,
    evidence,
    features,
    order,
    own_files,
    prior,
    response,
    solved,
    trust,
)
from quantmix.loss.model import FloatArray, mix_damage, total
from quantmix.loss.quality import Quality
from quantmix.models.model import Model
from quantmix.store import Measurement


@dataclass(frozen=True)
class FittedModel:
    """A loss model of one model; see `LossModel` for what it answers.

    Attributes:
        share: share of each tensor in uniform damage, shape (n_tensors,).
        posterior: parameters of the response.
        bench: the rows behind it, and the base.
        basis: `prior` when no row could be used, else `calibrated`.
        imatrix: whether quantization will use an importance matrix.
        own: whether the rows are one's own measured files.
    """

    share: FloatArray
    posterior: calibrate.Posterior
    bench: evidence.Bench
    basis: str
    imatrix: bool = True
    own: bool = False

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        imatrix: bool = True,
        measured: Sequence[evidence.Published] | None = None,
    ) -> FittedModel:
        """Fit the posterior of `model` on its published rows (or on `measured`)."""
        share = prior.shares(model)
        bench = evidence.bench(model, share, evidence.of_model(model, measured))
        return cls.on_bench(model, share, bench, imatrix=imatrix)

    @classmethod
    def of_own(
        cls, model: Model, measured: Sequence[Measurement], *, imatrix: bool = True
    ) -> FittedModel | None:
        """Fit on one's own measured files; None when no three mixes were measured alike."""
        share = prior.shares(model)
        bench = own_files.bench(model, share, measured)
        if bench is None:
            return None
        return replace(cls.on_bench(model, share, bench, imatrix=imatrix), own=True)

    @classmethod
    def on_bench(
        cls, model: Model, share: FloatArray, bench: evidence.Bench, *, imatrix: bool = True
    ) -> FittedModel:
        """Fit the posterior of `model` on the rows of `bench`."""
        known = calibrate.prior(
            bench.ln_base, bench.ln_base_sd, model.n_elements, prior.scale_law(model)
        )
        posterior = calibrate.fit(bench.rows, known)
        # Files known by size only say little of scale and nothing of types.
        known_mix = any(r.exact and r.w.any() for r in bench.rows)
        return cls(share, posterior, bench, "calibrated" if known_mix else "prior", imatrix)

    def damage(self, model: Model, types: Sequence[GgmlType]) -> FloatArray:
        """Return damage in nats, shape (n_tensors, n_types); see `LossModel.damage`."""
        gains = response.cell_gains(order.kept(self.posterior)) * self._factors()
        column = features.columns()
        by_group = np.zeros((features.N_GROUPS, len(types)))
        scale = np.exp(self.posterior.theta[response.SCALE])
        for j, qtype in enumerate(types):
            name = curve.own_name(qtype)
            if name in column:
                by_group[:, j] = gains[:, column[name]]
            else:
                by_group[:, j] = scale * curve.gain(qtype).gain
        groups = np.array([features.group(t, model.hparams.n_layer) for t in model.tensors])
        cells = self.share[:, None] * by_group[groups]
        position = {t.name: j for j, t in enumerate(types)}
        for i, tensor in enumerate(model.tensors):
            for name in {tensor.source_type, tensor.exact_type} & position.keys():
                if features.lossless(tensor, name, imatrix=self.imatrix):
                    cells[i, position[name]] = 0.0
        return np.asarray(cells)

    def quality(self, model: Model, mix: Sequence[GgmlType | None]) -> Quality:
        """Predict the whole mix; see `LossModel.quality`."""
        damage = total(mix_damage(self, model, mix))
        h = calibrate.hyper()
        w = features.of_types(model, self.share, mix, imatrix=self.imatrix)
        p = self.of_features(w)
        ln_c = float(self.posterior.theta[response.ONSET])
        rise = float(response.super_additive(damage, ln_c, h.power))
        base = math.exp(self.bench.ln_base)
        known = self.bench.base_known
        low, high = p.interval(h)
        low = rise - (p.ln_ppl - low)
        low, rise, high = trust.printed(
            (low, rise, rise + (high - p.ln_ppl)),
            bpw=trust.weights_bpw(model, mix),
            damage=damage,
            n_vocab=model.hparams.n_vocab,
            ln_base=self.bench.ln_base,
        )
        return Quality(
            damage=damage,
            ln_ppl_ratio=rise,
            ppl=base * math.exp(rise) if known else None,
            ppl_low=base * math.exp(low) if known else None,
            ppl_high=base * math.exp(high) if known else None,
            ppl_base=base if known else None,
            basis=self.basis,
            warnings=(*trust.warnings(model, mix, damage, self), *self._doubtful()),
            ln_ppl_ratio_low=low,
            ln_ppl_ratio_high=high,
        )

    def of_features(self, w: FloatArray) -> calibrate.Prediction:
        """Predict a mix known by its features only, shape (N_GROUPS, n_columns)."""
        w = w * self._factors()
        ratio_only = not self.bench.base_known
        return self._less_sure(calibrate.predict(self.posterior, w, over_base=ratio_only), w)

    def of_somebody(self, model: Model, mix: Sequence[GgmlType | None]) -> FittedModel:
        """Return the model for a mix that somebody else made, perhaps knowing every tensor.

        Where its types alternate from layer to layer, `solved.shares`; otherwise this model.
        """
        share = solved.shares(model, self.share, mix, calibrate.hyper().solved)
        return self if np.array_equal(share, self.share) else replace(self, share=share)

    def _doubtful(self) -> tuple[str, ...]:
        """Return a warning that names own files which contradict the others."""
        if not self.own or not self.posterior.doubtful:
            return ()
        files = ", ".join(self.posterior.doubtful[:3])
        return (f"far from what your other files say, hardly counted: {files}; measure again",)

    def _factors(self) -> FloatArray | float:
        """Damage without an importance matrix relative to with one, shape (n_columns,)."""
        return 1.0 if self.imatrix else features.without_imatrix()

    def _less_sure(self, p: calibrate.Prediction, w: FloatArray) -> calibrate.Prediction:
        """Add what models differ by where there is no importance matrix.

        The spread is mostly the model's, common to its types: their standard deviations add up,
        weighted by damage.
        """
        if self.imatrix or p.damage <= 0.0:
            return p
        by_type = (w * response.cell_gains(self.posterior.theta)).sum(axis=0)
        spread = float(by_type @ features.ln_without_imatrix_sds()) / float(by_type.sum())
        # ln rise moves faster than ln damage where damage is super-additive.
        grown = p.rise / p.damage - 1.0
        spread *= (1.0 + (1.0 + calibrate.hyper().power) * grown) / (1.0 + grown)
        return replace(p, relative=float(np.hypot(p.relative, spread)))
