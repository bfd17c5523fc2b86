"""From a type per tensor to the few anchored rules that give it, proven by matching them back.

Every rule is anchored and names its layers, so no two rules match the same tensor and the order
does not matter: engines have been first-wins and last-wins (docs/architecture.md, facts).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quantmix.emit.regex import int_group, word_group
from quantmix.ggml.types import Engine
from quantmix.models.model import Tensor

# Sections of a published recipe, in the order people write them; a role's first match decides.
_SECTIONS: Final = (
    ("Token embedding and output", re.compile(r"^(token_embd|output|per_layer_)")),
    ("Routed experts", re.compile(r"_exps$|_chexps$")),
    ("Shared experts", re.compile(r"_shexp$")),
    ("Attention", re.compile(r"^(attn|ssm|indexer)")),
    ("Dense feed-forward", re.compile(r"^ffn")),
    ("Multi-token prediction", re.compile(r"^nextn")),
)
_PRINT_ORDER: Final = (
    "Attention",
    "Dense feed-forward",
    "Shared experts",
    "Routed experts",
    "Multi-token prediction",
    "Other",
    "Token embedding and output",
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One `regex=type` of llama-quantize and the section it is printed under."""

    pattern: str
    type: str
    section: str

    @property
    def text(self) -> str:
        """The rule as the engines read it."""
        return f"{self.pattern}={self.type}"


def section_of(role: str) -> str:
    """Return the heading under which a role is printed."""
    return next((name for name, pattern in _SECTIONS if pattern.search(role)), "Other")


def build_rules(tensors: Sequence[Tensor], types: Mapping[str, str]) -> tuple[Rule, ...]:
    """Return rules that give every tensor of `types` (name → type) its type and match no other.

    Roles that take the same type on the same layers share a rule (`ffn_(gate|up)_exps`). A role
    with one type on all its layers gets `[0-9]+` for the layer.
    """
    layers: dict[tuple[str, str], set[int]] = defaultdict(set)
    whole: dict[str, set[int]] = defaultdict(set)
    rules: list[Rule] = []
    for t in tensors:
        if t.name not in types:
            continue
        if t.layer is None:
            pattern = f"^{re.escape(t.name)}$"
            rules.append(Rule(pattern, types[t.name], section_of(t.role)))
        else:
            layers[t.role, types[t.name]].add(t.layer)
            whole[t.role].add(t.layer)
    shared: dict[tuple[str, frozenset[int], bool], list[str]] = defaultdict(list)
    for (role, qtype), where in layers.items():
        shared[qtype, frozenset(where), where == whole[role]].append(role)
    for (qtype, where_set, everywhere), roles in shared.items():
        for section in dict.fromkeys(section_of(r) for r in roles):
            mine = sorted(r for r in roles if section_of(r) == section)
            block = "[0-9]+" if everywhere else int_group(where_set)
            pattern = rf"^blk\.{block}\.{_role_group(mine)}\.weight$"
            rules.append(Rule(pattern, qtype, section))
    return tuple(sorted(rules, key=lambda r: (_PRINT_ORDER.index(r.section), _key(r))))


def first_match(
    names: Iterable[str], rules: Sequence[tuple[str, str]], engine: Engine
) -> dict[str, str | None]:
    """Return what `engine` would apply to each name: the first rule whose regex is found in it.

    Python's `re.search` and ECMAScript's `regex_search` agree on the patterns that `build_rules`
    writes. Mainline lowercases patterns (tools/quantize: parse_tensor_type).
    """
    compiled = [(re.compile(p.lower() if engine == "mainline" else p), qtype) for p, qtype in rules]
    return {n: next((q for p, q in compiled if p.search(n)), None) for n in names}


def split_rule(text: str) -> tuple[str, str]:
    """Cut one emitted rule at its only `=`."""
    pattern, _, qtype = text.partition("=")
    return pattern, qtype


def _key(rule: Rule) -> tuple[str, int, str]:
    """Order inside a section: by role, then by first layer."""
    role = rule.pattern.rpartition(r"\.weight$")[0].rpartition(r"\.")[2]
    digits = re.search(r"\d+", rule.pattern.removeprefix("^blk"))
    return role, int(digits.group()) if digits else -1, rule.type


def _role_group(roles: list[str]) -> str:
    """Return a group for role names; what they share at both ends stays outside of it."""
    if len(roles) == 1:
        return word_group(roles)
    words = [r.split("_") for r in roles]
    head = _common(words)
    tail = _common([w[head:][::-1] for w in words])
    middle = ["_".join(w[head : len(w) - tail]) for w in words]
    if not all(middle):
        return word_group(roles)
    before = "".join(f"{w}_" for w in words[0][:head])
    after = "".join(f"_{w}" for w in words[0][len(words[0]) - tail :]) if tail else ""
    return re.escape(before) + word_group(middle) + re.escape(after)


def _common(words: list[list[str]]) -> int:
    """Return how many leading parts all lists share."""
    n = 0
    while all(len(w) > n for w in words) and len({w[n] for w in words}) == 1:
        n += 1
    return n
