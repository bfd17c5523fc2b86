"""A loss model from own measurements: KLD of roles, bands and tensors on the real model.

Per role, KLD follows the weighted quantization error above a floor (`role_damage`). A role that was
not measured keeps its share of the prior, scaled to the measured ones. Inside a role, KLD is shared
out over its tensors by band and tensor probes, shrunk towards the prior by their own noise:
unshrunk shares predict 5-8 % too well, because a solver picks what was under-measured.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantmix.errors import UsageError
from quantmix.ggml.types import GgmlType, table
from quantmix.loss import calibrate, curve, features, prior, response, role_damage, trust
from quantmix.loss.model import FloatArray, mix_damage, total
from quantmix.loss.quality import Quality
from quantmix.loss.role_damage import RoleDamage
from quantmix.measurements import Measurements, Probe
from quantmix.models.model import Model

# ln(PPL/base) per nat of KLD where the probes say nothing: 0.74 to 1.04 on 21 of 26 models with
# pure types (GGUF Tool Suite sweeps). It counts like 0.05 nats of probes.
_PPL_PER_NAT, _PPL_PER_NAT_NATS, _PPL_PER_NAT_LN_SD = 0.9, 0.05, 0.12
# Whole mix over the sum of whole roles: 1 + (c · sum)^P. Roles at iq4_xs, iq3_xxs, iq2_xs, iq1_s
# one at a time and all together on SmolLM2: sums 0.136, 0.555, 1.51, 4.70 give 0.135, 0.605, 1.78,
# 6.53. Less than for single tensors, since a role's own KLD has its part of it.
_ROLE_LN_ONSET, _ROLE_POWER = math.log(0.055), 0.69
# Spread of a summed prediction of measured roles against really quantized mixes, in ln KLD.
_FORM_LN_SD = 0.08
# Damage moves with the text: on SmolLM2 the same roles and types lay 29-49 % higher on chunks that
# were not probed, and a whole mix 44 % higher in ln PPL on the test text.
_OTHER_TEXT_LN_SD = 0.3
_EXTRAPOLATED_LN_SD = 0.35
# The level that a table of single tensors sums up to, beyond what text and form explain: sparse
# models' experts flip or do not with a single tensor. 14 tables of the GGUF Tool Suite against
# published mixes of their models, 0.5 to 3.7 times what was measured
# (`python tests/bench/bench_tables.py`).
_TABLE_LN_SD = 0.35
_QUANTILE = 1.645
# Roles that were not measured are named when they take more than this of the damage.
_TELLING = 0.1


@dataclass(frozen=True)
class MeasuredModel:
    """A loss model of one model, from its own measurements.

    Attributes:
        roles: fitted damage by role.
        part: what a tensor takes of its role's KLD, shape (n_tensors,); sums to one per role.
        scale: nats at iq4_k per unit of prior share, for roles that were not measured.
        ppl_base: perplexity of the unquantized model on the measured text, None where unknown.
        ppl_per_nat: ln(PPL/base) per nat of KLD, from the probes.
        imatrix, measured_imatrix: whether the file, and the probes, are made with one.
        summed: whether roles are sums over single tensors, as in tables of other tools.
    """

    roles: Mapping[str, RoleDamage]
    part: FloatArray
    share: FloatArray
    scale: float
    ppl_base: float | None
    ppl_per_nat: float = _PPL_PER_NAT
    basis: str = "measured"
    imatrix: bool = True
    measured_imatrix: bool = True
    summed: bool = False

    @classmethod
    def of(cls, model: Model, measured: Measurements, *, imatrix: bool = True) -> MeasuredModel:
        """Build the model from role, band and tensor probes of `measured`.

        Raises:
            UsageError: the probes were made around a quantized mix, not around the base.
        """
        if measured.around:
            raise UsageError(
                "these measurements were made around a quantized mix: measure without --around"
            )
        share = prior.shares(model)
        found = role_damage.fit(model, _by_role(model, measured), measured)
        by_role: dict[str, float] = defaultdict(float)
        for tensor, s in zip(model.tensors, share, strict=True):
            by_role[tensor.role] += float(s)
        middle = [table("ik")["iq4_k"]]
        reference = [(float(d.at(middle)[0]), by_role[r]) for r, d in found.items()]
        known = sum(s for _, s in reference)
        if known > 0.0:
            scale = sum(k for k, _ in reference) / known
        else:
            law, h = prior.scale_law(model), calibrate.hyper()
            scale = math.exp(calibrate.ln_scale_prior(model.n_elements, law, h)[0])
        roles = [p for p in measured.probes if p.scope == "role"]
        rise = sum(p.ln_ratio for p in roles) + _PPL_PER_NAT * _PPL_PER_NAT_NATS
        kld = sum(p.kld for p in roles) + _PPL_PER_NAT_NATS
        return cls(
            found,
            _parts(model, share, measured),
            share,
            scale,
            measured.ppl_base if measured.ppl_base > 0.0 else None,
            min(max(rise / kld, 0.5), 1.5),
            imatrix=imatrix,
            # A table does not say: unknown counts as used, as for published perplexities.
            measured_imatrix=measured.imatrix is not None or measured.is_table,
            summed=measured.is_table,
        )

    def damage(self, model: Model, types: Sequence[GgmlType]) -> FloatArray:
        """Return damage in nats, shape (n_tensors, n_types); see `LossModel.damage`."""
        gains = curve.gains(types)
        by_role = {r: d.at(types) for r, d in self.roles.items()}
        cells = np.empty((len(model.tensors), len(types)))
        for i, tensor in enumerate(model.tensors):
            if tensor.role in by_role:
                cells[i] = self.part[i] * by_role[tensor.role]
            else:
                cells[i] = self.scale * self.share[i] * gains
        cells *= self._without_imatrix(types)
        cells[:, gains == 0.0] = 0.0
        position = {t.name: j for j, t in enumerate(types)}
        for i, tensor in enumerate(model.tensors):
            # What a role was measured at stands: the engine rounds activations too.
            exact = "" if tensor.role in by_role else tensor.exact_type
            for name in {tensor.source_type, exact} & position.keys():
                if features.lossless(tensor, name, imatrix=self.imatrix):
                    cells[i, position[name]] = 0.0
        return cells

    def kld(self, damage: float) -> float:
        """Return the mean KLD of a whole mix, nats, from its summed damage."""
        return float(response.super_additive(damage, _ROLE_LN_ONSET, _ROLE_POWER))

    def quality(self, model: Model, mix: Sequence[GgmlType | None]) -> Quality:
        """Predict the whole mix; see `LossModel.quality`."""
        cells = mix_damage(self, model, mix)
        damage = total(cells)
        kld = self.kld(damage)
        rise = self.ppl_per_nat * kld
        relative = math.hypot(
            self._relative_sd(model, mix, cells),
            _PPL_PER_NAT_LN_SD,
            _OTHER_TEXT_LN_SD,
            _TABLE_LN_SD if self.summed else 0.0,
        )
        # What super-additivity adds was seen on one model only: it may be twice as much.
        relative = math.hypot(relative, 1.0 - damage / max(kld, 1e-12))
        reach = min(_QUANTILE * relative, 20.0)
        low = rise * math.exp(-reach)
        high = rise * math.exp(reach)
        base = self.ppl_base
        low, rise, high = trust.printed(
            (low, rise, high),
            bpw=trust.weights_bpw(model, mix),
            damage=damage,
            n_vocab=model.hparams.n_vocab,
            ln_base=math.log(base or 1.0),
        )
        return Quality(
            damage=damage,
            ln_ppl_ratio=rise,
            ppl=base and base * math.exp(rise),
            ppl_low=base and base * math.exp(low),
            ppl_high=base and base * math.exp(high),
            ppl_base=base,
            basis=self.basis,
            warnings=(
                *trust.warnings(model, mix, damage, self),
                *self._below(model, mix),
                *self._unmeasured(model, cells),
                *self._other_imatrix(),
            ),
            ln_ppl_ratio_low=low,
            ln_ppl_ratio_high=high,
        )

    def _relative_sd(
        self, model: Model, mix: Sequence[GgmlType | None], cells: FloatArray
    ) -> float:
        """Return the sd of ln damage: each role's noise and extrapolation weigh by its damage."""
        total = float(cells.sum())
        if total <= 0.0:
            return _FORM_LN_SD
        by_role: dict[str, float] = defaultdict(float)
        # One scale serves all roles that were not measured, and types that were not probed are off
        # for one reason: these errors add up, while the noise of roles averages out.
        alike = 0.0
        for tensor, qtype, value in zip(model.tensors, mix, cells, strict=True):
            part = float(value) / total
            known = self.roles.get(tensor.role)
            by_role[tensor.role] += part
            if known is None or (qtype is not None and known.outside(qtype)):
                alike += _EXTRAPOLATED_LN_SD * part
            elif qtype is not None:
                alike += known.reach_ln_sd(qtype) * part
        noise = [self.roles[r].relative_sd * part for r, part in by_role.items() if r in self.roles]
        return math.hypot(_FORM_LN_SD, alike, *noise, self._imatrix_ln_sd(model, mix, cells))

    def _outside(self, role: str, qtype: GgmlType) -> bool:
        known = self.roles.get(role)
        return known is not None and known.outside(qtype)

    def _below(self, model: Model, mix: Sequence[GgmlType | None]) -> tuple[str, ...]:
        """Return a warning that names roles at types worse than any that was measured."""
        roles = sorted(
            {
                f"{t.role} at {q.name}"
                for t, q in zip(model.tensors, mix, strict=True)
                if q is not None and self._outside(t.role, q)
            }
        )
        if not roles:
            return ()
        some = ", ".join(roles[:4]) + (", …" if len(roles) > 4 else "")
        return (f"below the worst measured type, extrapolated pessimistically: {some}",)

    def _unmeasured(self, model: Model, cells: FloatArray) -> tuple[str, ...]:
        """Return a warning that names roles that were not measured, when much rests on them."""
        total = float(cells.sum())
        by_role: dict[str, float] = defaultdict(float)
        for tensor, value in zip(model.tensors, cells, strict=True):
            if tensor.role not in self.roles:
                by_role[tensor.role] += float(value)
        if sum(by_role.values()) <= _TELLING * total:
            return ()
        roles = sorted((r for r, v in by_role.items() if v > 0.0), key=lambda r: -by_role[r])
        some = ", ".join(roles[:4]) + (", …" if len(roles) > 4 else "")
        share = sum(by_role.values()) / total
        return (f"{share:.0%} of the damage is of roles that were not measured: {some}",)

    def _other_imatrix(self) -> tuple[str, ...]:
        """Return a warning when the probes were made with an imatrix and the file will not be."""
        if self.imatrix and not self.measured_imatrix:
            return ("measured without an importance matrix: with one the types lose less",)
        return ()

    def _without_imatrix(self, types: Sequence[GgmlType]) -> FloatArray:
        """Return what probes with an imatrix are multiplied by without one, shape (n_types,)."""
        if self.imatrix or not self.measured_imatrix:
            return np.ones(len(types))
        return np.array([curve.without_imatrix(curve.own_name(t)).gain for t in types])

    def _imatrix_ln_sd(
        self, model: Model, mix: Sequence[GgmlType | None], cells: FloatArray
    ) -> float:
        """Return the sd of ln damage that models differ by in what a missing imatrix costs."""
        if self.imatrix or not self.measured_imatrix:
            return 0.0
        sds = (0.0 if q is None else curve.without_imatrix(curve.own_name(q)).sd for q in mix)
        return float(np.dot(list(sds), cells) / cells.sum())


def _by_role(model: Model, measured: Measurements) -> dict[str, list[Probe]]:
    """Return the probes that cover a whole role."""
    layers: dict[str, set[int]] = defaultdict(set)
    for t in model.tensors:
        if t.quantizable and t.loaded and t.layer is not None:
            layers[t.role].add(t.layer)
    found: dict[str, list[Probe]] = defaultdict(list)
    for p in measured.probes:
        if p.scope == "role" and (not p.layers or set(p.layers) >= layers[p.role]):
            found[p.role].append(p)
    return found


def _parts(model: Model, share: FloatArray, measured: Measurements) -> FloatArray:
    """Return what each tensor takes of its role, shape (n_tensors,): shrunk towards the prior."""
    where: dict[str, list[int]] = defaultdict(list)
    for i, t in enumerate(model.tensors):
        if t.quantizable and t.loaded:
            where[t.role].append(i)
    part = np.zeros(len(model.tensors))
    for role, members in where.items():
        start = share[members] / share[members].sum()
        found, noise = _measured_parts(model, role, members, measured)
        if found is not None:
            spread = float(np.var(found / start))
            # What varies beyond the noise is signal (empirical Bayes).
            weight = max(0.0, 1.0 - noise / spread) if spread > 0.0 else 0.0
            start = weight * found + (1.0 - weight) * start
        part[members] = start / start.sum()
    return part


def _measured_parts(
    model: Model, role: str, members: Sequence[int], measured: Measurements
) -> tuple[FloatArray | None, float]:
    """Return parts of a role's tensors from tensor or band probes, and their relative variance."""
    position = {model.tensors[i].layer: k for k, i in enumerate(members)}
    sums: dict[str, tuple[FloatArray, FloatArray, FloatArray]] = {}
    for p in measured.probes:
        if p.role != role or p.scope == "role" or not p.layers:
            continue
        covered = [position[x] for x in p.layers if x in position]
        if not covered or len(covered) == len(members):
            continue
        empty = (np.zeros(len(members)), np.zeros(len(members)), np.zeros(len(members)))
        value, var, n = sums.setdefault(p.type, empty)
        kld = max(p.kld - measured.noise_floor, 0.0) / len(covered)
        value[covered] += kld
        var[covered] += (p.kld_err / len(covered)) ** 2
        n[covered] += 1
    full = [(v / n, s / n**2) for v, s, n in sums.values() if n.all() and v.sum() > 0.0]
    if not full:
        return None, 0.0
    parts = np.mean([v / v.sum() for v, _ in full], axis=0)
    noise = float(np.mean([np.mean(s) / np.mean(v) ** 2 for v, s in full])) / len(full)
    return np.asarray(parts), noise
