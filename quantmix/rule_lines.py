"""Reads `regex=type` lines as other tools write them, and applies them as the engine would."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from quantmix.errors import UsageError
from quantmix.ggml.types import Engine, spelled, table
from quantmix.models.model import Model

_COMMENT = re.compile(r"(^|\s)#.*$")
_FLAG = re.compile(r"^--(custom-q|tensor-type)(?:=(.*))?$", re.DOTALL)
_HAS_FLAG = re.compile(
    r"(^|\s)--(custom-q|tensor-type|token-embedding-type|output-tensor-type)(?=[\s=]|$)"
)
# Flags that type one tensor: in both engines they win over the rules.
_ONE = {
    "token-embedding-type": r"^token_embd\.weight$",
    "output-tensor-type": r"^output\.weight$",
}
_ONE_FLAG = re.compile(rf"^--({'|'.join(_ONE)})(?:=(.*))?$", re.DOTALL)
# `custom="` on a line of its own up to a line with the closing quote, or a here-document.
_OPENS = re.compile(r"""^(\w+)=(?:(["'])|\$\(cat\s+<<-?\s*["']?(\w+)["']?)$""")
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


def parse_rules(
    lines: Iterable[str], engine: Engine = "ik", *, source: str = ""
) -> list[tuple[re.Pattern[str], str]]:
    """Return (regex, type) in order. Blank lines and `#` comments are skipped.

    A line may hold several rules joined by commas, as in ik's `--custom-q`; it may also be a
    pasted command, of which the values of `--custom-q`, `--tensor-type`, `--token-embedding-type`
    and `--output-tensor-type` count, quotes and backslashes read as a shell reads them, or the
    script that quantizers publish: rules in `custom="…"`, then `--custom-q "$custom"`. Types may be
    written in any case; they come back spelled as the engine spells them. Patterns for mainline are
    lowercased, as mainline does (tools/quantize/quantize.cpp parse_tensor_type). `source` is the
    file to name in errors.

    Raises:
        UsageError: a line is not a rule, its regex is malformed, or the type is unknown.
    """
    rules = []
    for number, part in _parts(list(lines), source):
        where = _where(source, number)
        pattern, sep, name = part.rpartition("=")
        if not sep or not pattern:
            raise UsageError(f"{where}: {part!r} is not a rule: write regex=type")
        qtype = spelled(name.strip(), engine)
        if qtype not in table(engine):
            raise UsageError(
                f"{where}: {engine} has no type {name.strip()!r}: see `quantmix types`"
            )
        try:
            text_of = pattern.lower() if engine == "mainline" else pattern
            rules.append((re.compile(text_of), qtype))
        except re.error as err:
            raise UsageError(f"{where}: regex {pattern!r} is malformed: {err}") from err
    return rules


def resolve_rules(
    lines: Iterable[str], model: Model, engine: Engine = "ik", *, source: str = ""
) -> dict[str, str]:
    """Return the type that the rules ask for, by tensor name; the first match wins, un-anchored.

    Tensors that no rule matches are left out. Fallbacks are not applied (`ggml.types.resolve`).

    Raises:
        UsageError: as `parse_rules`.
    """
    rules = parse_rules(lines, engine, source=source)
    found = {}
    for tensor in model.tensors:
        qtype = next((q for pattern, q in rules if pattern.search(tensor.name)), None)
        if qtype is not None:
            found[tensor.name] = qtype
    return found


def taken_by_accident(lines: Iterable[str], model: Model, engine: Engine = "ik") -> list[str]:
    """Say which rules take tensors, by part of the name, that a later rule names in full.

    Such as `output\\.weight=q8_0` before `blk\\..*\\.attn_output\\.weight=iq4_ks`: the engine's
    search is un-anchored, so the first takes all `blk.N.attn_output.weight` (docs/recipe-files.md).
    One line per pair of rules that differ in type.
    """
    rules = parse_rules(lines, engine)
    taken: dict[tuple[int, int], list[str]] = {}
    for tensor in model.tensors:
        hits = [i for i, (pattern, _) in enumerate(rules) if pattern.search(tensor.name)]
        if len(hits) < 2 or rules[hits[0]][0].fullmatch(tensor.name):
            continue
        meant = next((i for i in hits[1:] if rules[i][0].fullmatch(tensor.name)), None)
        if meant is not None and rules[meant][1] != rules[hits[0]][1]:
            taken.setdefault((hits[0], meant), []).append(tensor.name)
    return [
        f"rule {rules[first][0].pattern}={rules[first][1]} takes {len(names)} tensors such as "
        f"{names[0]}, which the later {rules[later][0].pattern}={rules[later][1]} names in full: "
        "begin the first with ^ if that is not meant"
        for (first, later), names in taken.items()
    ]


def _parts(lines: Sequence[str], source: str) -> Iterator[tuple[int, str]]:
    """Yield every rule as (number of its line, text), those of commands and scripts included."""
    texts = [_COMMENT.sub("", line).strip() for line in lines]
    blocks, texts = _cut_blocks(texts)
    first: list[tuple[int, str]] = []
    found: list[tuple[int, str]] = []
    at = 0
    while at < len(texts):
        end = at + 1
        while end < len(texts) and texts[end - 1].endswith("\\"):
            end += 1
        if any(_HAS_FLAG.search(t) for t in texts[at:end]):
            words, end = _words(texts, at, end, source)
            values = _values(words)
            first += [(at + 1, rule) for rule in _single(words)]
        else:
            end = at + 1
            values = [] if blocks else [texts[at]]  # the other commands of a script
        for value in values:
            variable = _VARIABLE.fullmatch(value)
            if variable and variable[1] in blocks:
                found += blocks[variable[1]]
                continue
            for part in filter(None, (p.strip() for p in re.split(r"[,\n]", value))):
                number = next((i + 1 for i in range(at, end) if part in texts[i]), at + 1)
                found.append((number, part))
        at = end
    if blocks and not found:
        found = [part for block in blocks.values() for part in block]
    yield from first
    yield from found


def _cut_blocks(texts: Sequence[str]) -> tuple[dict[str, list[tuple[int, str]]], list[str]]:
    """Return the rules that shell variables hold, by name, and the lines without them."""
    blocks: dict[str, list[tuple[int, str]]] = {}
    rest = list(texts)
    for start, text in enumerate(texts):
        opened = _OPENS.match(text)
        close = opened and (opened[2] or opened[3])
        if not opened or not close or close not in texts[start + 1 :]:
            continue
        end = texts.index(close, start + 1)
        blocks[opened[1]] = [
            (i + 1, part.strip())
            for i in range(start + 1, end)
            for part in texts[i].split(",")
            if part.strip()
        ]
        rest[start : end + 1] = [""] * (end + 1 - start)
    return blocks, rest


def _words(texts: Sequence[str], at: int, end: int, source: str) -> tuple[list[str], int]:
    """Split the command that begins at line `at` as a shell does; quotes may reach beyond `end`."""
    while True:
        try:
            return shlex.split(re.sub(r"\\\n|\\$", " ", "\n".join(texts[at:end]))), end
        except ValueError:
            if end == len(texts):
                raise UsageError(f"{_where(source, at + 1)}: its quotes do not pair") from None
            end += 1


def _values(words: Sequence[str]) -> list[str]:
    """Return the values of `--custom-q` and `--tensor-type` among the words of a command."""
    values = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        match = _FLAG.match(word)
        if match:
            values.append(following if match[2] is None else match[2])
    return values


def _single(words: Sequence[str]) -> list[str]:
    """Return the flags that type one tensor as rules."""
    rules = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        match = _ONE_FLAG.match(word)
        if match:
            rules.append(f"{_ONE[match[1]]}={following if match[2] is None else match[2]}")
    return rules


def _where(source: str, number: int) -> str:
    return f"{source}, line {number}" if source else f"line {number}"
