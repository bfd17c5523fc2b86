"""Command lines are read as the engines read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.emit.cmdline import parse, parse_text, split_overrides


@given(st.lists(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)), max_size=12))
def test_any_tokens_are_read_without_an_error(tokens: list[str]) -> None:
    """Whatever people paste, parsing gives a command line and never raises."""
    command = parse(tokens)
    assert len(command.options) + len(command.words) + len(command.env) <= len(tokens)


@given(st.text(max_size=80))
def test_any_text_is_read_without_an_error(text: str) -> None:
    """Unbalanced quotes and stray backslashes are problems to name, not crashes."""
    parse_text(text)


def test_long_and_short_spellings_are_one_option() -> None:
    """--n-gpu-layers, --gpu-layers and -ngl are the same, with `=` or a blank."""
    for text in ("-ngl 63", "--n-gpu-layers 63", "--gpu-layers=63"):
        assert parse_text(text).integer("ngl") == 63


def test_multi_token_prediction_is_one_option_however_it_is_written() -> None:
    """ik moved -mtp to --spec-type, which names other drafts too."""
    for text in ("-mtp -c 5", "--spec-type mtp:n_max=1 -c 5", "--spec-type=mtp -c 5"):
        assert parse_text(text).has("mtp")
    assert not parse_text("--spec-type ngram -c 5").has("mtp")


def test_overrides_split_at_commas_and_at_the_first_equals_sign() -> None:
    """A comma inside a regex breaks the list: the engines would see two broken pieces."""
    assert [(o.pattern, o.buffer) for o in split_overrides("a=CPU,b=c=CUDA0")] == [
        ("a", "CPU"),
        ("b", "c=CUDA0"),
    ]
    assert [(o.pattern, o.buffer) for o in split_overrides(r"blk\.\d{1,2}\.=CPU")] == [
        (r"blk\.\d{1", ""),
        (r"2}\.", "CPU"),
    ]


def test_bare_fa_does_not_swallow_the_next_flag() -> None:
    """`-fa -fmoe` is two flags; `-fa on` is one with a value."""
    bare = parse_text("-fa -fmoe -ngl 99")
    assert bare.has("fmoe")
    assert bare.value("fa") is None
    assert parse_text("-fa on").value("fa") == "on"


def test_the_environment_in_front_is_kept() -> None:
    """CUDA_VISIBLE_DEVICES="2,1,0,3" before the binary is environment, not a word."""
    command = parse_text('CUDA_VISIBLE_DEVICES="2,1,0,3" ./llama-server \\\n -ts 1/2/3')
    assert command.env == {"CUDA_VISIBLE_DEVICES": "2,1,0,3"}
    assert command.words == ("./llama-server",)
    assert command.tensor_split == (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('-ot "exps=CPU\n-ngl 99', "quotes"),
        ("-ngl 99\n-fa", "backslash"),
        ("-fa on -ngl", "needs a value"),
    ],
)
def test_what_pasting_loses_is_named(text: str, said: str) -> None:
    """An unclosed quote, a missing line continuation and a flag without its value are told."""
    assert any(said in p for p in parse_text(text).problems)


@pytest.mark.parametrize(
    ("text", "launcher", "env"),
    [
        ("numactl --interleave=all ./llama-server -c 5", ("numactl", "--interleave=all"), {}),
        (
            "sudo taskset -c 0-15 env CUDA_VISIBLE_DEVICES=1 ./llama-server -c 5",
            ("sudo", "taskset", "-c", "0-15", "env"),
            {"CUDA_VISIBLE_DEVICES": "1"},
        ),
        (
            "docker run --gpus all -e CUDA_VISIBLE_DEVICES=1 -p 80:80 "
            "ghcr.io/ggml-org/llama.cpp:server-cuda -c 5",
            ("docker", "run", "--gpus", "all", "-p", "80:80"),
            {"CUDA_VISIBLE_DEVICES": "1"},
        ),
        (
            "export CUDA_VISIBLE_DEVICES=1\ncd /opt && ./llama-server -c 5 2>&1 | tee log",
            ("cd", "/opt", "&&"),
            {"CUDA_VISIBLE_DEVICES": "1"},
        ),
        ("$ ./llama-server -c 5 &", (), {}),
        ("export A=1; ./llama-server -c 5; echo -c 6", (), {"A": "1"}),
    ],
)
def test_what_starts_the_program_is_none_of_its_flags(
    text: str, launcher: tuple[str, ...], env: dict[str, str]
) -> None:
    """Flags of numactl, sudo and docker, `cd … &&` and a pipe are not taken for the engine's."""
    command = parse_text(text)
    assert (command.launcher, command.env) == (launcher, env)
    assert [(o.name, o.value) for o in command.options] == [("c", "5")]
    assert len(command.words) == 1
    assert command.problems == ()


@pytest.mark.parametrize(
    "text",
    [
        '.\\llama-server.exe ^\n -m "C:\\m\\x.gguf" ^\n -c 5',
        ".\\llama-server.exe `\n -m C:\\m\\x.gguf -c 5",
    ],
)
def test_lines_of_windows_shells_are_read(text: str) -> None:
    """`^` and a backtick continue a line there, and a backslash parts folders."""
    command = parse_text(text)
    assert command.words == (".\\llama-server.exe",)
    assert (command.value("model"), command.integer("c")) == ("C:\\m\\x.gguf", 5)
    assert command.problems == ()


def test_typographic_quotes_and_dashes_are_read_and_named() -> None:
    """What a web page made of quotes and hyphens is read as it was meant, and told."""
    command = parse_text("./llama-server –ngl 9 —ctx-size 5 -ot “exps=CPU”")
    assert (command.integer("ngl"), command.integer("c"), command.value("ot")) == (9, 5, "exps=CPU")
    assert [any(w in p for p in command.problems) for w in ("quotes", "dash")] == [True, True]
