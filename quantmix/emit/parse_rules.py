"""Reads `regex=type` lines as other tools write them, and applies them as the engine would."""

from __future__ import annotations

import re
from collections.abc import Iterable

from quantmix.errors import UsageError
from quantmix.ggml.types import Engine, table
from quantmix.models.model import Model

_COMMENT = re.compile(r"(^|\s)#.*$")


def parse_rules(lines: Iterable[str], engine: Engine = "ik") -> list[tuple[re.Pattern[str], str]]:
    """Return (regex, type) in order. Blank lines and `#` comments are skipped.

    A line may hold several rules joined by commas, as in ik's `--custom-q`. Types may be written
    in any case; they come back spelled as the engine spells them. Patterns for mainline are
    lowercased, as mainline does (tools/quantize/quantize.cpp parse_tensor_type).

    Raises:
        UsageError: a line is not a rule, its regex is malformed, or the type is unknown.
    """
    spelled = {name.lower(): name for name in table(engine)}
    rules = []
    for number, line in enumerate(lines, 1):
        text = _COMMENT.sub("", line).strip()
        for part in filter(None, (p.strip() for p in text.split(","))):
            pattern, sep, name = part.rpartition("=")
            if not sep or not pattern:
                raise UsageError(f"line {number}: {part!r} is not a rule: write regex=type")
            qtype = name.strip()
            if qtype not in table(engine):
                qtype = spelled.get(qtype.lower(), "")
            if not qtype:
                raise UsageError(f"line {number}: {engine} has no type {name.strip()!r}")
            try:
                text_of = pattern.lower() if engine == "mainline" else pattern
                rules.append((re.compile(text_of), qtype))
            except re.error as err:
                raise UsageError(f"line {number}: regex {pattern!r} is malformed: {err}") from err
    return rules


def resolve_rules(lines: Iterable[str], model: Model, engine: Engine = "ik") -> dict[str, str]:
    """Return the type that the rules ask for, by tensor name; the first match wins, un-anchored.

    Tensors that no rule matches are left out. Fallbacks are not applied (`ggml.types.resolve`).

    Raises:
        UsageError: as `parse_rules`.
    """
    rules = parse_rules(lines, engine)
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
