"""A llama-server command line, read as the engines read it: which flags, which values, in order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

# canonical name → spellings; the names are the short flags of both engines.
_SPELLINGS: Final[dict[str, tuple[str, ...]]] = {
    "model": ("-m", "--model"),
    "alias": ("-a", "--alias"),
    "ngl": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
    "ts": ("-ts", "--tensor-split"),
    "sm": ("-sm", "--split-mode"),
    "mg": ("-mg", "--main-gpu"),
    "dev": ("-dev", "--device"),
    "ot": ("-ot", "--override-tensor"),
    "ncmoe": ("-ncmoe", "--n-cpu-moe"),
    "cmoe": ("-cmoe", "--cpu-moe"),
    "fa": ("-fa", "--flash-attn"),
    "mla": ("-mla", "--mla-use"),
    "amb": ("-amb", "--attention-max-batch"),
    "fmoe": ("-fmoe", "--fused-moe"),
    "ooae": ("-ooae", "--offload-only-active-experts"),
    "rtr": ("-rtr", "--run-time-repack"),
    "ser": ("-ser", "--smart-expert-reduction"),
    "op": ("-op", "--offload-policy"),
    "c": ("-c", "--ctx-size"),
    "b": ("-b", "--batch-size"),
    "ub": ("-ub", "--ubatch-size"),
    "ctk": ("-ctk", "--cache-type-k"),
    "ctv": ("-ctv", "--cache-type-v"),
    "np": ("-np", "--parallel"),
    "cram": ("-cram", "--cache-ram"),
    "nkvo": ("-nkvo", "--no-kv-offload"),
    "fit": ("-fit", "--fit"),
    "mtp": ("-mtp", "--multi-token-prediction"),
    "t": ("-t", "--threads"),
    "tb": ("-tb", "--threads-batch"),
    "host": ("--host",),
    "port": ("--port",),
    "no-mmap": ("--no-mmap",),
    "mlock": ("--mlock",),
    "jinja": ("--jinja",),
}
_BY_SPELLING: Final = {s: name for name, spellings in _SPELLINGS.items() for s in spellings}
_BARE: Final = frozenset(
    {"cmoe", "fmoe", "ooae", "rtr", "nkvo", "mtp", "no-mmap", "mlock", "jinja"},
)
_FA_VALUES: Final = frozenset({"on", "off", "auto", "0", "1"})
_ENV: Final = re.compile(r"^[A-Z][A-Z0-9_]*=")


@dataclass(frozen=True, slots=True)
class Option:
    """One flag as typed. `name` is canonical (`ngl`), or the spelling when it is not known here."""

    name: str
    value: str | None
    spelling: str


@dataclass(frozen=True, slots=True)
class Override:
    """One `regex=BUFFER` of an `-ot`."""

    pattern: str
    buffer: str


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A parsed command line: options in order, `-ot` split into overrides, leading environment.

    `problems` names what no engine could read, one sentence each.
    """

    options: tuple[Option, ...]
    env: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def value(self, name: str) -> str | None:
        """Return the value of the last option of that canonical name, None when absent."""
        found = [o.value for o in self.options if o.name == name]
        return found[-1] if found else None

    def has(self, name: str) -> bool:
        """Whether the option was given."""
        return any(o.name == name for o in self.options)

    def integer(self, name: str) -> int | None:
        """Return the value as an int, None when absent or not a number."""
        text = self.value(name)
        return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None

    @property
    def overrides(self) -> tuple[Override, ...]:
        """All `-ot` overrides in command-line order."""
        return tuple(
            o for opt in self.options if opt.name == "ot" for o in split_overrides(opt.value or "")
        )

    @property
    def tensor_split(self) -> tuple[float, ...]:
        """Values of `-ts`; empty when absent or unreadable."""
        text = self.value("ts") or ""
        try:
            return tuple(float(p) for p in re.split(r"[,/]+", text) if p.strip())
        except ValueError:
            return ()


def split_overrides(value: str) -> list[Override]:
    """Split an `-ot` value as both engines do: at every comma, then each at its first `=`.

    A piece without `=` gets an empty buffer (the engines refuse it).
    """
    pieces = [p for p in value.split(",") if p]
    return [Override(*p.split("=", 1)) if "=" in p else Override(p, "") for p in pieces]


def parse(tokens: Sequence[str]) -> CommandLine:
    """Read tokens (already split) into options.

    A flag that is not known here takes the next token as its value unless that looks like a flag;
    `-fa` takes one only when it is on, off, auto, 0 or 1 (builds differ: the linter judges).
    """
    options: list[Option] = []
    words: list[str] = []
    problems: list[str] = []
    env: dict[str, str] = {}
    i = 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        if _ENV.match(token) and not options:
            name, _, text = token.partition("=")
            env[name] = text
            continue
        if not _is_flag(token):
            words.append(token)
            continue
        spelling, joined, inline = token.partition("=") if token.startswith("--") else (token,) * 3
        if token.startswith("--") and joined:
            options.append(Option(_BY_SPELLING.get(spelling, spelling), inline, spelling))
            continue
        canonical = _BY_SPELLING.get(token, token)
        following = tokens[i] if i < len(tokens) else None
        value = None
        if _takes_value(canonical, following):
            value, i = following, i + 1
        elif canonical in ("ngl", "ts", "ot", "ncmoe", "c", "b", "ub"):
            problems.append(f"{token} needs a value")
        options.append(Option(canonical, value, token))
    return CommandLine(tuple(options), env, tuple(words), tuple(problems))


def parse_text(text: str) -> CommandLine:
    """Read a pasted command line: line continuations, quotes, leading environment.

    What people lose when pasting is repaired and named in `problems`: a quote that is never
    closed, and a backslash before a line break that is missing.
    """
    joined = re.sub(r"\\[ \t]*\r?\n", " ", text)
    problems = []
    lines = [line for line in joined.splitlines() if line.strip()]
    if len(lines) > 1:
        problems.append(
            "a line ends without a backslash: the shell would run the rest as another command"
        )
    joined = " ".join(lines)
    try:
        tokens = shlex.split(joined)
    except ValueError as err:
        problems.append(f"quotes do not pair ({err}): the shell would wait for more input")
        tokens = [t.strip("\"'") for t in joined.split()]
    parsed = parse([t for t in tokens if t != "\\"])
    return CommandLine(parsed.options, parsed.env, parsed.words, (*problems, *parsed.problems))


def _is_flag(token: str) -> bool:
    return re.match(r"^--?[A-Za-z]", token) is not None


def _takes_value(canonical: str, following: str | None) -> bool:
    if following is None or canonical in _BARE:
        return False
    if canonical == "fa":
        return following.lower() in _FA_VALUES
    if canonical == "fit":
        return following.lower() in ("on", "off")
    return not _is_flag(following)
