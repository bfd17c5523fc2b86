"""A llama-server command line, read as the engines read it: which flags, which values, in order."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
# Programs of llama.cpp, and the images that hold them: what stands before them starts them.
_PROGRAM: Final = re.compile(
    r"llama-(server|cli|(sweep-|batched-)?bench|perplexity|completion|mtmd-cli|simple|run)(\.exe)?"
    r"|(ik_)?llama\.cpp:[\w.-]+"
)
_NAMING: Final = frozenset({"-m", "--model", "-a", "--alias"})
_CONTINUED: Final = re.compile(r"(\\|(?<=\s)[\^`])[ \t]*\r?\n")  # of bash, cmd.exe, PowerShell
_REST: Final = re.compile(r"[|&;]+|\d?>>?.*|&>.*")  # a pipe or a redirection: the line ends
_CURLY: Final = str.maketrans("“”„‘’", '"""\'\'')
_OWN_COMMAND: Final = re.compile(
    r"\s*(#|\$?\s*(export|set|cd|source|ulimit|sudo sysctl)\s|[A-Z_]+=\S*$)"
)
_DASH: Final = re.compile(r"^-?[–—]-?(?=[A-Za-z])")
_WINDOWS: Final = re.compile(r"\.exe\b|[\^`][ \t]*\r?\n")  # where a backslash parts folders


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

    `launcher` is what stands before a program that is known, without the environment, such as
    `numactl --interleave=all`. `words` begins with the program. `problems` names what no engine
    could read, one sentence each.
    """

    options: tuple[Option, ...]
    env: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()

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
    problems: list[str] = []
    i = _program(tokens)
    env, launcher = _before(tokens[:i])
    words: list[str] = []
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
        elif canonical in ("ngl", "ts", "dev", "ot", "ncmoe", "c", "b", "ub"):
            problems.append(f"{token} needs a value")
        options.append(Option(canonical, value, token))
    named = tuple(replace(o, name="mtp") if _runs_mtp(o) else o for o in options)
    return CommandLine(named, env, tuple(words), tuple(problems), launcher)


def _runs_mtp(option: Option) -> bool:
    """Whether it is ik's newer spelling of -mtp, among the values of a flag for other drafts."""
    return option.spelling == "--spec-type" and (option.value or "").startswith("mtp")


def parse_text(text: str) -> CommandLine:
    """Read a pasted command line: line continuations, quotes, leading environment.

    First lines that set up the shell (`export`, `cd`, comments) are commands of their own: only
    what they export counts. A pipe or a redirection ends the line. What people lose when pasting
    is repaired and named in `problems`: a quote that is never closed, a backslash before a line
    break that is missing, quotes and dashes that a web page made typographic.
    """
    problems = []
    joined = _CONTINUED.sub(" ", text)
    if _WINDOWS.search(text):
        joined = joined.replace("\\", "\\\\")
    plain = joined.translate(_CURLY)
    if plain != joined:
        problems.append("typographic quotes are no quotes to a shell: write \" or '")
    lines = [line for line in plain.splitlines() if line.strip()]
    starts = next((i for i, line in enumerate(lines) if not _sets_up(line)), 0)
    env = {k: v for line in lines[:starts] for k, v in _before(_tokens(line)[0])[0].items()}
    lines = lines[starts:]
    if len(lines) > 1:
        problems.append(
            "a line ends without a backslash: the shell would run the rest as another command"
        )
    tokens, unpaired = _tokens(" ".join(lines))
    problems += [unpaired] if unpaired else []
    if any(_DASH.match(t) for t in tokens):
        problems.append("a typographic dash begins no flag: write - or --")
        tokens = [_undashed(t) if _DASH.match(t) else t for t in tokens]
    first = _program(tokens)
    end = next((i for i, t in enumerate(tokens) if i > first and _REST.fullmatch(t)), len(tokens))
    tokens = _up_to_semicolon(tokens[:end], first)
    found = parse([t for t in tokens if t != "\\"])
    return replace(found, env=env | found.env, problems=(*problems, *found.problems))


def _up_to_semicolon(tokens: list[str], program: int) -> list[str]:
    """The tokens up to a semicolon behind one; before the program's flags it sets a variable."""
    flagged = False
    for i, token in enumerate(tokens[program:], program):
        if flagged and token.endswith(";"):
            return [*tokens[:i], token.rstrip(";")]
        flagged = flagged or _is_flag(token)
    return tokens


def _undashed(token: str) -> str:
    """The flag that a typographic dash stands before."""
    name = _DASH.sub("", token)
    return f"-{name}" if f"-{name}" in _BY_SPELLING else f"--{name}"


def _tokens(text: str) -> tuple[list[str], str]:
    """Split as a shell does; where quotes do not pair, at blanks, and say so."""
    try:
        return shlex.split(text), ""
    except ValueError as err:
        problem = f"quotes do not pair ({err}): the shell would wait for more input"
        return [t.strip("\"'") for t in text.split()], problem


def _sets_up(line: str) -> bool:
    """Whether a line is a command of its own, before the one with the program."""
    own = _OWN_COMMAND.match(line) is not None
    return own and not any(_names_program(t) for t in _tokens(line)[0])


def _program(tokens: Sequence[str]) -> int:
    """Return the place of the first llama.cpp program, 0 when none is named."""
    for i, token in enumerate(tokens):
        if _names_program(token) and (i == 0 or tokens[i - 1] not in _NAMING):
            return i
    return 0


def _names_program(token: str) -> bool:
    return _PROGRAM.fullmatch(re.split(r"[/\\]", token)[-1]) is not None


def _before(tokens: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Part what stands before the program in environment and the words that start it."""
    env: dict[str, str] = {}
    words: list[str] = []
    for token in tokens:
        if _ENV.match(token):
            name, _, text = token.partition("=")
            env[name] = text.rstrip(";")
            if words and words[-1] in ("-e", "--env", "export", "set"):
                words.pop()
        elif token in ("&&", ";", "$") and (not words or words[-1] in ("&&", ";")):
            continue  # a prompt, or what followed an assignment
        else:
            words.append(token)
    return env, tuple(words)


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
