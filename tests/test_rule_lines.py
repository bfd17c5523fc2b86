"""Rules of other tools."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.errors import UsageError
from quantmix.models.sources import load_model
from quantmix.rule_lines import parse_rules, resolve_rules, taken_by_accident


def test_first_match_wins_unanchored_with_comments_and_commas() -> None:
    """`output=` also hits attn_output, as in the engine; later rules never override."""
    model = load_model("qwen3.5-0.8b")
    lines = [
        "## head",
        "attn_output=Q6_K,token_embd\\.weight=iq4_k  # why",
        "",
        ".*=iq3_k",
        "x=q8_0",
    ]
    types = resolve_rules(lines, model)
    assert types["blk.3.attn_output.weight"] == "q6_K"
    assert types["token_embd.weight"] == "iq4_k"
    assert types["blk.0.ffn_up.weight"] == "iq3_k"
    assert set(types) == {t.name for t in model.tensors}


@pytest.mark.parametrize("line", ["nonsense", "=q8_0", "a=", "(=q8_0", "a=q9_9"])
def test_broken_lines_name_themselves(line: str) -> None:
    """What is no rule is a usage error with the line's number."""
    with pytest.raises(UsageError, match="line 2"):
        parse_rules(["# fine", line])

    with pytest.raises(UsageError, match=r"^my\.recipe, line 2"):
        parse_rules(["# fine", line], source="my.recipe")


@pytest.mark.parametrize(
    "text",
    [
        '--custom-q "blk\\..*\\.ffn_up=iq2_k,output\\.weight=q8_0"',
        "--custom-q 'blk\\..*\\.ffn_up=IQ2_K,output\\.weight=Q8_0' \\",
        '--custom-q="blk\\..*\\.ffn_up=iq2_k,\noutput\\.weight=q8_0"',
        '--tensor-type "blk\\..*\\.ffn_up=iq2_k" --tensor-type "output\\.weight=q8_0"',
        "./llama-quantize --imatrix a=b.dat \\\n --tensor-type 'blk\\..*\\.ffn_up=iq2_k' \\\n"
        " --tensor-type 'output\\.weight=q8_0' \\\n in.gguf out.gguf Q4_K 16",
        "blk\\..*\\.ffn_up=iq2_k\n--tensor-type 'output\\.weight=q8_0'",
    ],
)
def test_pasted_commands_give_their_rules(text: str) -> None:
    """What people post is read as a shell reads it; other words of the command are left alone."""
    found = [(r.pattern, q) for r, q in parse_rules(text.splitlines())]
    assert found == [(r"blk\..*\.ffn_up", "iq2_k"), (r"output\.weight", "q8_0")]


SCRIPT = r"""#!/usr/bin/env bash
custom="
# Attention
blk\..*\.attn_q.*=q8_0

token_embd\.weight=IQ4_K
"

custom=$(
  echo "$custom" | grep -v '^#' | \
  sed -Ez 's:\n+:,:g;s:,$::;s:^,::'
)

./build/bin/llama-quantize \
    --custom-q "$custom" \
    --imatrix m.dat \
    Some-BF16.gguf out.gguf IQ3_K 24
"""
HERE = SCRIPT.replace('custom="', "custom=$(cat <<'RULES'", 1).replace('\n"\n', "\nRULES\n)\n", 1)


@pytest.mark.parametrize("text", [SCRIPT, HERE, SCRIPT.split("custom=$(")[0]])
def test_the_script_that_quantizers_publish_gives_its_rules(text: str) -> None:
    """Rules in a shell variable count, the script around them does not; lines keep their number."""
    found = [(r.pattern, q) for r, q in parse_rules(text.splitlines())]
    assert found == [(r"blk\..*\.attn_q.*", "q8_0"), (r"token_embd\.weight", "iq4_k")]
    with pytest.raises(UsageError, match="line 6: ik has no type 'q9_9'"):
        parse_rules(text.replace("IQ4_K", "q9_9").splitlines())


def test_flags_for_one_tensor_win_over_the_rules() -> None:
    """--token-embedding-type and --output-tensor-type type these two, whatever the rules say."""
    text = '--custom-q "token_embd=q8_0,.*=iq3_k" --token-embedding-type q4_K '
    text += "--output-tensor-type=q6_K in.gguf Q4_K"
    types = resolve_rules([text], load_model("qwen3-30b-a3b"))
    assert (types["token_embd.weight"], types["output.weight"]) == ("q4_K", "q6_K")
    assert types["blk.0.attn_output.weight"] == "iq3_k"


def test_mistakes_in_pasted_commands_have_their_line() -> None:
    """The line that holds the rule; quotes that never close."""
    with pytest.raises(UsageError, match="line 3: ik has no type 'q9_9'"):
        parse_rules(["# mine", "--custom-q 'a=q8_0,", "b=q9_9'"])
    with pytest.raises(UsageError, match="line 1: its quotes do not pair"):
        parse_rules(["--custom-q 'a=q8_0", "b=q4_K"])


@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_text_parses_or_is_a_usage_error(lines: list[str]) -> None:
    """The reader never fails otherwise."""
    try:
        parse_rules(lines)
    except UsageError:
        return


def test_rules_that_take_more_than_they_name_are_told() -> None:
    """An un-anchored rule that takes tensors a later one names in full is said; anchors mend it."""
    model = load_model("glm-4.5-air")
    later = r"blk\.\d+\.attn_output\.weight=iq4_ks"
    (said,) = taken_by_accident([r"output\.weight=q8_0", later], model)
    assert said.startswith(r"rule output\.weight=q8_0 takes 47 tensors such as blk.0.attn_output")
    assert later in said
    assert taken_by_accident([r"^output\.weight=q8_0", later], model) == []
    assert taken_by_accident([r"output\.weight=iq4_ks", later], model) == []
    assert taken_by_accident([r"attn_output=q8_0", r"ffn=q4_K"], model) == []
