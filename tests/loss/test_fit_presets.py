"""Presets of llama-quantize as mixes."""

from __future__ import annotations

import pytest

from quantmix.engine.mainline_find import find_mainline
from quantmix.engine.presets import types_of
from quantmix.errors import EngineMissing
from quantmix.loss import mixes
from quantmix.loss.fit import curate, presets
from quantmix.models.sources import load_model


def test_a_mix_by_layer_reads_back_as_it_was() -> None:
    """The text names every tensor's type, whatever layers have it."""
    model = load_model("qwen2.5-0.5b-instruct")
    kinds = ("q4_K", "q5_K", "q6_K")
    types = {
        t.name: kinds[(t.layer or 0) * (t.layer or 0) % 3] for t in model.tensors if t.quantizable
    }
    read = mixes.resolve(model, presets.as_mix(model, types))
    for tensor, chances in zip(model.tensors, read, strict=True):
        if tensor.name in types:
            assert chances == {types[tensor.name]: 1.0}


def test_presets_are_told_from_mixes() -> None:
    """Only a whole quantized preset counts; floats and presets with exceptions do not."""
    assert curate.preset_of("ftype:q4_K_M") == "Q4_K_M"
    assert curate.preset_of("ftype:F16") is None
    assert curate.preset_of("ftype:Q4_0;output=q8_0") is None
    assert curate.preset_of("all=q4_0") is None
    assert curate.preset_key("m", "Q2_K", "unknown") == curate.preset_key("m", "Q2_K", "yes")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("preset", "imatrix"), [("IQ3_XXS", "yes"), ("Q4_K_M", "yes"), ("Q3_K_S", "no")]
)
def test_shipped_presets_are_what_mainline_gives(preset: str, imatrix: str) -> None:
    """The engine, asked again, names the same types; IQ3_XXS asks whether there is a matrix."""
    try:
        find_mainline("quantize", libraries_only=True)
    except EngineMissing:
        pytest.skip("no mainline library here")
    model = load_model("llama-3-8b")
    types = types_of(model, preset, "mainline", imatrix=imatrix == "yes")
    assert curate.preset_mixes()["llama-3-8b", preset, imatrix] == presets.as_mix(model, types)
    if preset == "IQ3_XXS":
        assert types_of(model, preset, "mainline", imatrix=False) != types
