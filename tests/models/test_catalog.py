"""Names as people type them."""

from __future__ import annotations

import pytest

from quantmix.errors import UnknownName, UsageError
from quantmix.models.catalog import catalog, find
from quantmix.models.sources import load_model


@pytest.mark.parametrize(
    ("typed", "model_id"),
    [
        ("r1", "deepseek-r1"),
        ("DeepSeek-R1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("unsloth/DeepSeek-R1-0528-GGUF", "deepseek-r1-0528"),
        ("  DeepSeek_V3.1 ", "deepseek-v3.1"),
        ("qwen3-235b", "qwen3-235b-a22b"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b-a22b-instruct-2507"),
        ("llama-3.1-70b-instruct", "llama-3.1-70b"),
        ("Meta-Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("qwen3-coder-480b", "qwen3-coder-480b-a35b-instruct"),
        ("GLM-4.5-Air-bf16", "glm-4.5-air"),
        ("mistral-large", "mistral-large-2411"),
        ("mixtral-8x22b-instruct", "mixtral-8x22b"),
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("unsloth/Llama-3.3-70B-Instruct-GGUF", "llama-3.3-70b-instruct"),
        ("llama-3.3-70b", "llama-3.3-70b-instruct"),
        ("Meta-Llama-3-8B", "llama-3-8b"),
        ("LLaMA-v2-7B", "llama-2-7b"),
        ("Llama-2-70b-hf", "llama-2-70b"),
        ("mistral-7b", "mistral-7b-v0.1"),
        ("qwen2.5-7b", "qwen2.5-7b-instruct"),
        ("qwen2.5-coder-7b", "qwen2.5-coder-7b-instruct"),
        ("Qwen2-7B", "qwen2-7b-instruct"),
        ("qwq", "qwq-32b"),
    ],
)
def test_names_people_type(typed: str, model_id: str) -> None:
    """Ids, aliases, repository names, owners, case and form suffixes all lead to the model."""
    assert find(typed).id == model_id
    assert load_model(typed).id == model_id


def test_every_model_is_found_by_each_of_its_names() -> None:
    """No alias or repository name is shadowed by another model."""
    for entry in catalog().values():
        for name in (entry.id, *entry.aliases, entry.hf_repo, entry.display):
            assert find(name).id == entry.id
    assert len(catalog()) == 99


def test_typo_gets_the_nearest_name() -> None:
    """A typo is answered with the name that was meant."""
    with pytest.raises(UnknownName, match="did you mean deepseek-r1"):
        find("deepsek-r1")


def test_ambiguous_beginning_lists_the_candidates() -> None:
    """A beginning shared by several models names them instead of guessing."""
    with pytest.raises(UnknownName, match=r"gemma-3-27b-it"):
        find("gemma-3")


@pytest.mark.parametrize(
    "name", ["llama-3-8b-instruct", "llama-2-7b-chat-hf", "mistral-7b-instruct-v0.2"]
)
def test_other_weights_of_a_known_geometry_are_unknown(name: str) -> None:
    """A chat or instruct model is not taken for the base model of its name."""
    with pytest.raises(UnknownName, match="unknown model"):
        find(name)


@pytest.mark.parametrize("name", ["", "/", "-", "../../etc"])
def test_nonsense_is_unknown(name: str) -> None:
    """Nonsense is refused, never matched."""
    with pytest.raises(UnknownName):
        find(name)


def test_every_row_carries_its_source_and_verification() -> None:
    """No fact without a source; verification is one of three words."""
    for entry in catalog().values():
        assert entry.source
        assert entry.verified in ("yes", "partial", "loader")


def test_layout_must_fit_the_model() -> None:
    """A layout for a model without MLA, or an unknown one, is refused."""
    with pytest.raises(UsageError, match="MLA"):
        load_model("llama-3.1-8b", layout="ik")
    with pytest.raises(UsageError, match="split, legacy or ik"):
        load_model("r1", layout="plain")
    assert load_model("r1").layout == "split"
