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
