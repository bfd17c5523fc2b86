"""Checkpoints that were never converted: configs, indexes, headers, and unknown families."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.errors import BadFile, UsageError
from quantmix.models.catalog import catalog
from quantmix.models.hf_config import Config, architecture_of, read_config
from quantmix.models.huggingface import INDEX, Checkpoint, model_from_config
from quantmix.models.model import Model
from quantmix.models.sources import load_model

# Facts of published configs (the keys that shape the model), by catalog id.
CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "hf_configs.json").read_text()
)


def names_of(model_id: str) -> Checkpoint:
    """Names that the checkpoint of a model with an MTP block holds in it."""
    h = catalog()[model_id].hparams
    mtp = f"model.layers.{h.n_layer}."
    names = {"model.layers.0.self_attn.q_proj.bias"} if h.qkv_bias else {"lm_head.weight"}
    if h.nextn_in_gguf:
        names.add(mtp + "eh_proj.weight")
    for there, name in (
        (h.nextn_embed, "embed_tokens.weight"),
        (h.nextn_head, "shared_head.head.weight"),
        (h.nextn_norm, "shared_head.norm.weight"),
    ):
        if there:
            names.add(mtp + name)
    if not h.output_in_gguf:
        names.discard("lm_head.weight")
        names.add("model.norm.weight")
    return Checkpoint(frozenset(names))


def build(model_id: str, stored: Checkpoint | None = None) -> Model:
    """The model of a published config."""
    stored = stored if stored is not None else names_of(model_id)
    return model_from_config(CONFIGS[model_id], stored, model_id, "test", None)


@pytest.mark.parametrize("model_id", list(CONFIGS))
def test_config_gives_the_tensors_of_the_gguf(model_id: str) -> None:
    """The list made from config.json and index equals the one known to be right."""
    model, known = build(model_id), load_model(model_id)
    assert (model.id, model.arch, model.layout) == (known.id, known.arch, known.layout)
    assert model.tensors == known.tensors
    mine, real = asdict(model.hparams), asdict(known.hparams)
    if not known.hparams.nextn_in_gguf:
        for name in ("nextn_layers", "nextn_norm"):
            mine.pop(name), real.pop(name)
    assert mine == real


def test_every_architecture_of_the_catalog_has_a_config() -> None:
    """No family is left untested."""
    assert {catalog()[i].arch for i in CONFIGS} == {e.arch for e in catalog().values()}


def test_without_an_index_the_assumption_is_stated() -> None:
    """What only the checkpoint's names can tell is assumed and said."""
    model = build("glm-4.6", Checkpoint())
    assert model.tensors == load_model("glm-4.6").tensors
    assert "MTP" in model.notes[0]
    assert "no head is stored" in build("qwen3-4b", Checkpoint()).notes[0]


def test_names_settle_head_and_mtp() -> None:
    """A head stored although tied is kept; an MTP block that is not there is not listed."""
    tied = build("qwen3-4b", Checkpoint(frozenset({"lm_head.weight"})))
    assert "output.weight" in tied.by_name
    stripped = build("glm-4.6", Checkpoint(frozenset({"model.layers.0.self_attn.q_proj.bias"})))
    assert max(t.layer or 0 for t in stripped.tensors) == 91


def test_glm_5_2_indexer_types() -> None:
    """A list of indexer kinds becomes the layers that have one, and the MTP block."""
    kinds = ["full" if i < 3 or i % 4 == 2 else "shared" for i in range(78)]
    config = {**CONFIGS["glm-5"], "indexer_types": kinds}
    stored = names_of("glm-5.2")
    model = model_from_config(config, stored, "GLM-5.2", "test", None)
    assert model.tensors == load_model("glm-5.2").tensors
    assert model.id == "glm-5.2"


def test_layout_of_a_checkpoint_can_be_chosen() -> None:
    """An MLA checkpoint is not converted yet, so its layout is the user's choice."""
    made = model_from_config(CONFIGS["deepseek-r1"], Checkpoint(), "x", "test", "ik")
    assert made.tensors == load_model("deepseek-r1", layout="ik").tensors
    with pytest.raises(UsageError, match="MLA"):
        model_from_config(CONFIGS["qwen3-4b"], Checkpoint(), "x", "test", "ik")


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """Write a header without data."""
    doc = {n: {"dtype": dtype, "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **doc}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)


TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


def tiny_shapes() -> dict[str, tuple[int, ...]]:
    """The checkpoint of TINY, in HF order (out, in)."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (100, 64),
    }
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": (64,),
            at + "post_attention_layernorm.weight": (64,),
            at + "self_attn.q_proj.weight": (64, 64),
            at + "self_attn.k_proj.weight": (32, 64),
            at + "self_attn.v_proj.weight": (32, 64),
            at + "self_attn.o_proj.weight": (64, 64),
            at + "mlp.gate_proj.weight": (96, 64),
            at + "mlp.up_proj.weight": (96, 64),
            at + "mlp.down_proj.weight": (64, 96),
        }
    return shapes


def folder(path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    """Write a checkpoint folder."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    safetensors(path / "model.safetensors", shapes)
    return str(path)


def test_headers_that_agree_and_that_do_not(tmp_path: Path) -> None:
    """Headers are counted against the list; a difference is stated, not hidden."""
    good = load_model(folder(tmp_path / "Tiny One", TINY, tiny_shapes()))
    assert good.notes == ()
    assert good.id == "tiny-one"
    assert good.by_name["blk.1.ffn_down.weight"].shape == (96, 64)
    odd = load_model(folder(tmp_path / "odd", {**TINY, "intermediate_size": 97}, tiny_shapes()))
    assert "compare them" in odd.notes[0]


def test_unknown_family_same_conventions(tmp_path: Path) -> None:
    """An unknown family with usual names gets the same GGUF shapes, and says what it assumed."""
    known = load_model(folder(tmp_path / "a", TINY, tiny_shapes()))
    other = load_model(folder(tmp_path / "b", {**TINY, "model_type": "newllama"}, tiny_shapes()))
    assert {(t.name, t.shape, t.source_type) for t in other.tensors} == {
        (t.name, t.shape, t.source_type) for t in known.tensors
    }
    assert other.arch == "newllama"
    assert "newllama" in other.notes[0]
    assert other.hparams.head_dim_k == 16


def test_unknown_family_merges_experts_and_leaves_towers_out(tmp_path: Path) -> None:
    """Experts become one tensor per layer; vision and scales go; odd names stay."""
    shapes = tiny_shapes()
    for e in range(8):
        shapes[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"] = (32, 64)
        shapes[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] = (64, 32)
        shapes[f"model.layers.1.mlp.experts.{e}.down_proj.weight_scale_inv"] = (1, 1)
    shapes["visual.blocks.0.attn.weight"] = (5, 5)
    shapes["model.layers.0.mixer.strange"] = (7, 3)
    config = {**TINY, "model_type": "x", "num_experts": 8, "num_experts_per_tok": 2}
    model = load_model(folder(tmp_path / "m", config, shapes))
    down = model.by_name["blk.1.ffn_down_exps.weight"]
    assert down.shape == (32, 64, 8)
    assert down.active_fraction == 0.25
    assert model.by_name["blk.0.mixer.strange"].shape == (3, 7)
    assert not any("visual" in t.name or "scale" in t.name for t in model.tensors)
    assert any("left out" in n for n in model.notes)


def test_unknown_family_needs_headers(tmp_path: Path) -> None:
    """Without shapes, or with packed ones, an unknown family is refused with the mend."""
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "x"}')
    with pytest.raises(BadFile, match="convert it to GGUF first"):
        load_model(str(path))
    (path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "model.safetensors"}}))
    with pytest.raises(BadFile, match="convert it to GGUF first"):
        load_model(str(path))
    safetensors(path / "model.safetensors", {"a.weight": (4, 4), "b.weight_packed": (4, 4)})
    with pytest.raises(BadFile, match="packed"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b"{", "not JSON"),
        ("config.json", b"[]", "no JSON object"),
        ("config.json", b"[" * 100_000, "not JSON"),
        ("config.json", b"\xff\xfe\x00", "not JSON"),
        ("config.json", b'{"model_type": "llama"}', "num_attention_heads is missing"),
        (INDEX, b"{}", "no weight_map"),
        ("model.safetensors", b"abc", "too short"),
        ("model.safetensors", b"\xff" * 8 + b"{}", "a header of"),
        ("model.safetensors", b"\2\0\0\0\0\0\0\0xx", "not JSON"),
        ("model.safetensors", struct.pack("<Q", 8) + b'{"a": 1}', "no believable"),
    ],
)
def test_malformed_files_are_named(file: str, content: bytes, words: str, tmp_path: Path) -> None:
    """Every malformed part is refused in one line with its name."""
    path = tmp_path / "m"
    folder(path, TINY, tiny_shapes())
    (path / file).write_bytes(content)
    with pytest.raises(BadFile, match=words) as err:
        load_model(str(path))
    assert file in str(err.value) or "config.json" in str(err.value)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -1},
        {"hidden_size": "64"},
        {"hidden_size": 1e300},
        {"num_attention_heads": 0},
        {"vocab_size": True},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 1 << 30},
        {"num_hidden_layers": None},
    ],
)
def test_lying_config_is_refused(change: dict[str, Any]) -> None:
    """Values of the wrong kind or size are refused."""
    with pytest.raises(BadFile):
        model_from_config({**TINY, **change}, Checkpoint(), "m", "test", None)


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.dictionaries(
        st.sampled_from(sorted({k for c in CONFIGS.values() for k in c})),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        max_size=3,
    ),
)
def test_any_config_gives_values_or_a_bad_file(model_id: str, changes: dict[str, Any]) -> None:
    """No value in a config leads to anything but hyper-parameters or a BadFile."""
    config = Config({**CONFIGS[model_id], **changes}, "test")
    if architecture_of(config) is None:
        return
    with contextlib.suppress(BadFile):
        assert read_config(config).n_layer > 0


def test_hub_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """hf:… without huggingface_hub names the extra; a malformed name is refused first."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"quantmix\[hf\]"):
        load_model("hf:org/name")
    with pytest.raises(UsageError, match="hf:org/name"):
        load_model("hf:name")
