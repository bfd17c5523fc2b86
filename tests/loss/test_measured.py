"""The loss model from own measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantmix import loss, measurements
from quantmix.errors import BadFile, UsageError
from quantmix.ggml.types import get
from quantmix.loss.measured import MeasuredModel
from quantmix.measurements import Measurements, Probe
from quantmix.models.model import Model

from .conftest import catalog_model

# One role at a time on SmolLM2-135M (noisy, padded to 768), mean KLD in nats, and all together.
ROLES = {
    "attn_q": (0.2141, 0.0565, 0.0256, 0.0060),
    "attn_k": (0.2667, 0.0715, 0.0297, 0.0070),
    "attn_v": (0.5568, 0.2759, 0.0880, 0.0285),
    "attn_output": (0.5260, 0.1670, 0.0635, 0.0107),
    "ffn_gate": (0.8285, 0.2380, 0.0809, 0.0163),
    "ffn_up": (1.2506, 0.3629, 0.1280, 0.0293),
    "ffn_down": (1.0607, 0.3371, 0.1394, 0.0380),
}
TYPES = ("iq1_s", "iq2_xs", "iq3_xxs", "iq4_xs")
TOGETHER = {"iq2_xs": 1.7766, "iq3_xxs": 0.6049, "iq4_xs": 0.1355}


# Weighted errors of ffn_up of the same model; those of iq1_s and iq2_xs by the type curve.
ERRORS = {"iq1_s": 0.33, "iq2_xs": 0.083, "iq3_xxs": 0.0277, "iq4_xs": 0.0056}


def _probe(scope: str, role: str, layers: tuple[int, ...], qtype: str, kld: float) -> Probe:
    err = ERRORS.get(qtype, 0.1)
    return Probe(scope, role, layers, qtype, kld, 0.025 * kld, kld, 0.025 * kld, err, 1, 1.0)  # type: ignore[arg-type]


def _measured(model: Model) -> Measurements:
    probes = [
        _probe("role", role, (), q, kld)
        for role, klds in ROLES.items()
        for q, kld in zip(TYPES, klds, strict=True)
    ]
    return Measurements(
        model="m", model_name=model.id, base="b", engine="ik", corpus="c", imatrix="i", n_ctx=512,
        chunks=8, tokens=2040, ppl_base=25.4, noise_floor=1e-6, probes=tuple(probes),
    )  # fmt: skip


@pytest.fixture
def smol() -> Model:
    """SmolLM2-135M."""
    return catalog_model("smollm2-135m")


def _blocks(model: Model, name: str) -> list:
    return [get(name) if t.quantizable and t.layer is not None else None for t in model.tensors]


@pytest.mark.parametrize("name", sorted(TOGETHER))
def test_roles_together_are_predicted_from_roles_alone(name: str, smol: Model) -> None:
    """The rise over all block roles agrees with what was measured together within 10 %."""
    loss = MeasuredModel.of(smol, _measured(smol))
    kld = loss.quality(smol, _blocks(smol, name)).ln_ppl_ratio / loss.ppl_per_nat
    assert kld == pytest.approx(TOGETHER[name], rel=0.10)


def test_a_measured_role_at_a_measured_type_is_near_what_was_measured(smol: Model) -> None:
    """Cells of a role sum to its measured KLD within what the other types say."""
    loss = MeasuredModel.of(smol, _measured(smol))
    cells = loss.damage(smol, [get("iq3_xxs")])[:, 0]
    role = [c for t, c in zip(smol.tensors, cells, strict=True) if t.role == "ffn_down"]
    assert sum(role) == pytest.approx(0.1394, rel=0.08)


def test_between_measured_types_damage_lies_between(smol: Model) -> None:
    """iq3_k was not measured: it lies between iq4_xs and iq3_xxs."""
    loss = MeasuredModel.of(smol, _measured(smol))
    better, guess, worse = loss.damage(smol, [get("iq4_xs"), get("iq3_k"), get("iq3_xxs")]).sum(0)
    assert better < guess < worse


def test_below_the_worst_measured_type_nothing_is_flat(smol: Model) -> None:
    """With iq4_xs alone measured, iq1_s is at least as bad as the curve says, and is named."""
    few = _measured(smol)
    few = replace(few, probes=tuple(p for p in few.probes if p.type == "iq4_xs"))
    loss = MeasuredModel.of(smol, few)
    cells = loss.damage(smol, [get("iq4_xs"), get("iq1_s")]).sum(axis=0)
    assert cells[1] > 30 * cells[0]
    warned = loss.quality(smol, _blocks(smol, "iq2_xs")).warnings
    assert any("below the worst measured type" in w for w in warned)


def test_noisy_parts_are_shrunk_and_sure_ones_kept(smol: Model) -> None:
    """A tensor probe ten times its neighbours counts fully when sure, hardly when noise."""
    base = _measured(smol)
    layers = [t.layer for t in smol.tensors if t.role == "ffn_up"]
    shares = []
    for err in (1e-5, 0.5):
        probes = [
            replace(
                _probe("tensor", "ffn_up", (x,), "iq2_xs", 0.1 if x == 3 else 0.01), kld_err=err
            )
            for x in layers
            if x is not None
        ]
        loss = MeasuredModel.of(smol, replace(base, probes=(*base.probes, *probes)))
        i = [t.name for t in smol.tensors].index("blk.3.ffn_up.weight")
        shares.append(float(loss.part[i]))
    assert shares[0] == pytest.approx(0.1 / (0.1 + 29 * 0.01), rel=0.05)
    assert shares[1] < 0.06


def test_unmeasured_roles_keep_their_prior_weight(smol: Model) -> None:
    """token_embd was not measured: it costs its prior share at the measured scale."""
    loss = MeasuredModel.of(smol, _measured(smol))
    cells = loss.damage(smol, [get("iq4_k")])[:, 0]
    head = cells[[t.role for t in smol.tensors].index("token_embd")]
    assert 0.1 * cells.sum() < head < 0.8 * cells.sum()
    assert np.all(cells >= 0.0)


def test_measurements_around_a_mix_are_refused(smol: Model) -> None:
    """Deltas around a quantized mix are not KLD against the base."""
    with pytest.raises(UsageError, match="around"):
        MeasuredModel.of(smol, replace(_measured(smol), around={"output.weight": "q8_0"}))


def _relative_reach(loss: MeasuredModel, model: Model, name: str) -> float:
    q = loss.quality(model, [get(name) if t.quantizable else None for t in model.tensors])
    assert q.ln_ppl_ratio_high is not None
    return float(np.log(q.ln_ppl_ratio_high / q.ln_ppl_ratio))


def test_what_was_not_measured_widens_the_interval_and_is_named(smol: Model) -> None:
    """One role of nine, or one type far from the one asked for, is known less well than all."""
    full = _measured(smol)
    one_role = replace(full, probes=tuple(p for p in full.probes if p.role == "attn_k"))
    one_type = replace(full, probes=tuple(p for p in full.probes if p.type == "iq2_xs"))
    known = _relative_reach(MeasuredModel.of(smol, full), smol, "iq4_xs")
    assert _relative_reach(MeasuredModel.of(smol, one_role), smol, "iq4_xs") > known + 0.1
    far = _relative_reach(MeasuredModel.of(smol, one_type), smol, "q8_0")
    near = _relative_reach(MeasuredModel.of(smol, one_type), smol, "iq2_xs")
    assert far > near + 0.1
    mix = [get("iq4_xs") if t.quantizable else None for t in smol.tensors]
    said = MeasuredModel.of(smol, one_role).quality(smol, mix).warnings
    assert any("were not measured" in w and "ffn_up" in w for w in said)


def test_probes_with_a_matrix_do_not_stand_for_files_without(smol: Model) -> None:
    """Without one damage is larger and less sure; probes made without one stay as they are."""
    with_one = _measured(smol)
    without = replace(with_one, imatrix=None)
    types = [get("iq3_xxs"), get("q8_0")]
    plain = MeasuredModel.of(smol, with_one).damage(smol, types)
    worse = MeasuredModel.of(smol, with_one, imatrix=False).damage(smol, types)
    same = MeasuredModel.of(smol, without, imatrix=False).damage(smol, types)
    assert worse[:, 0].sum() > 1.2 * plain[:, 0].sum()
    assert np.allclose(worse[:, 1], plain[:, 1])
    assert np.allclose(same, plain)
    sure = _relative_reach(MeasuredModel.of(smol, with_one), smol, "iq4_xs")
    assert _relative_reach(MeasuredModel.of(smol, with_one, imatrix=False), smol, "iq4_xs") > sure
    said = MeasuredModel.of(smol, without).quality(smol, [None] * len(smol.tensors)).warnings
    assert any("measured without an importance matrix" in w for w in said)


def test_results_of_another_model_are_refused(tmp_path: Path, smol: Model) -> None:
    """By name where the catalog knows it, by the size of roles where it does not."""
    file = tmp_path / "m.json"
    sizes = {t.role: 0 for t in smol.tensors}
    for t in smol.tensors:
        sizes[t.role] += t.n_elements
    full = _measured(smol)
    right = replace(full, probes=tuple(replace(p, n_elements=sizes[p.role]) for p in full.probes))
    measurements.save(right, file)
    assert loss.load(smol, measurements=file).basis == "measured"
    with pytest.raises(BadFile, match=r"that is smollm2-135m.*quantmix measure"):
        loss.load(catalog_model("llama-3-8b"), measurements=file)
    measurements.save(replace(right, model_name="nobody knows"), file)
    assert loss.load(smol, measurements=file).basis == "measured"
    with pytest.raises(BadFile, match="weights there"):
        loss.load(catalog_model("llama-3-8b"), measurements=file)
