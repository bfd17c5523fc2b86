"""What the texts of flags mean: contexts, percentages, lists of types, rules."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantmix.errors import UsageError
from quantmix.palette import TypeLimits


def parse_ctx(text: str) -> int | None:
    """Return a context length of `32768` or `32k` (1024 each), None for `max`.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"(\d{1,12})([kK]?)", text.strip())
    if text.strip().lower() == "max":
        return None
    if match is None or int(match.group(1)) == 0:
        raise UsageError(f"--ctx {text[:40]!r} is not a context length: write 32768, 32k or max")
    return int(match.group(1)) * (1024 if match.group(2) else 1)


def parse_percent(text: str) -> float:
    """Return a share of `1%` or `1` as a fraction.

    Raises:
        UsageError: it is not a percentage above zero.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*%?", text.strip())
    if match is None or float(match.group(1)) <= 0:
        raise UsageError(f"--max-loss {text[:40]!r} is not a percentage: write it like 1%")
    return float(match.group(1)) / 100


def split_names(text: str | None) -> tuple[str, ...]:
    """Return the names of a list like `q8_0, iq4_ks`."""
    return tuple(t.strip() for t in (text or "").split(",") if t.strip())


def type_limits(
    types: str | None,
    pins: Sequence[str] | None,
    floors: Sequence[str] | None,
    *,
    imatrix: bool,
    allow_slow_cpu: bool = False,
) -> TypeLimits:
    """Return the limits that --types, --pin and --floor set.

    Raises:
        UsageError: an empty list of types, or a rule that is not REGEX=TYPE.
    """
    names = split_names(types)
    if types is not None and not names:
        raise UsageError("--types is empty: name types like q8_0,iq4_ks,iq2_kt")
    return TypeLimits(
        types=names,
        pins=split_rules(pins, "--pin"),
        floors=split_rules(floors, "--floor"),
        imatrix=imatrix,
        allow_slow_cpu=allow_slow_cpu,
    )


def split_rules(rules: Sequence[str] | None, flag: str) -> tuple[tuple[str, str], ...]:
    """Cut `REGEX=TYPE` texts at their last `=`.

    Raises:
        UsageError: one has no `=`.
    """
    result = []
    for rule in rules or ():
        pattern, sign, name = rule.rpartition("=")
        if not sign or not pattern or not name:
            raise UsageError(f"{flag} {rule!r} is not REGEX=TYPE")
        result.append((pattern, name))
    return tuple(result)
