"""Regex text that both engines read alike (std::regex, ECMAScript), short enough to be read.

The engines split rule lists on `,` and each rule at its first `=`, so neither may occur in a
pattern; `{m,n}` is out for that reason, and so is all that Python and ECMAScript read differently.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

_SPECIAL: Final = frozenset(r"\^$.|?*+()[]{}/")


def int_alternation(numbers: Iterable[int]) -> str:
    """Return a bare alternation that matches the decimal form of exactly these numbers.

    `{3..9, 10..19, 20}` gives `[3-9]|1[0-9]|20`. It is exact only between delimiters, as in
    `blk\\.(…)\\.`, and needs parentheses when it holds a `|`: `int_group` adds them.

    Raises:
        ValueError: the set is empty or holds a negative number.
    """
    wanted = set(numbers)
    if not wanted or min(wanted) < 0:
        raise ValueError(f"cannot write a pattern for {sorted(wanted)}: give numbers from 0 up")
    by_length: dict[int, set[str]] = defaultdict(set)
    for n in wanted:
        by_length[len(str(n))].add(str(n))
    return "|".join(branch for _, texts in sorted(by_length.items()) for branch in _branches(texts))


def int_group(numbers: Iterable[int]) -> str:
    """Return `int_alternation` ready to be put between delimiters: with `(…)` where needed."""
    text = int_alternation(numbers)
    return f"({text})" if "|" in text else text


def word_group(words: Iterable[str]) -> str:
    """Return a group that matches exactly one of `words`, in the order given.

    Raises:
        ValueError: no words, or one that a rule cannot hold.
    """
    escaped = [literal(w) for w in words]
    if not escaped:
        raise ValueError("cannot write a pattern for no words")
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def literal(text: str) -> str:
    """Return a pattern that matches `text` itself.

    Raises:
        ValueError: `text` holds a `,` or `=`, which no rule of either engine can carry.
    """
    if "," in text or "=" in text:
        raise ValueError(f"{text!r} holds ',' or '=': no rule of either engine can carry it")
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in text)


def _branches(texts: set[str]) -> list[str]:
    """Branches for digit strings of one length: those that share their last digits merge."""
    if texts == {""}:
        return [""]
    last_digits: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        last_digits[text[:-1]].add(text[-1])
    prefixes: dict[str, set[str]] = defaultdict(set)
    for prefix, digits in last_digits.items():
        prefixes["".join(sorted(digits))].add(prefix)
    ranked = [
        (min(group) + digits[0], branch + _digit_class(digits))
        for digits, group in prefixes.items()
        for branch in _branches(group)
    ]
    return [branch for _, branch in sorted(ranked)]


def _digit_class(digits: str) -> str:
    """`5` → `5`, `0123` → `[0-3]`, `02` → `[02]`; `digits` is sorted, without repeats."""
    if len(digits) == 1:
        return digits
    runs: list[str] = []
    for digit in digits:
        if runs and ord(digit) == ord(runs[-1][-1]) + 1:
            runs[-1] += digit
        else:
            runs.append(digit)
    return f"[{''.join(r if len(r) < 3 else f'{r[0]}-{r[-1]}' for r in runs)}]"
