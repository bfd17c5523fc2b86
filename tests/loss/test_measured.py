"""The loss model from own measurements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quantmix.errors import UsageError
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
