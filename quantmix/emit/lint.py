"""What pasted overrides really do: what each rule takes, what never matches, what lands oddly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from quantmix.emit.cmdline import CommandLine
from quantmix.emit.simulate import Rule
from quantmix.ggml.types import GgmlType
from quantmix.memory.homes import Homes, is_expert
from quantmix.memory.model import HOST
from quantmix.models.model import Model, Tensor
from quantmix.units import ranges

Severity = Literal["error", "warning", "note"]
_DIGIT_CLASS: Final = re.compile(r"\[[^\]]*\d-\d{2,}[^\]]*\]")
_EMPTY_BRANCH: Final = re.compile(r"\|\)|\(\||\|\||\|$|^\|")
_OPEN_NUMBER: Final = re.compile(r"blk\\?\.[^.\\]*[\d\])]$")
_OPEN_INSIDE: Final = re.compile(r"(blk\\?\.(?:\d+|\[[^\]]*\]|\([^()]*\)))(?=\.[*+])")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. `rule` is the number of the override it is about, from 1."""

    severity: Severity
    text: str
    rule: int | None = None


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What one override does.

    `matched` tensors hold the pattern, `won` of them are moved by it (the others were taken by
    earlier rules: `taken_by`, rule number → count). `layers` lists the layers it moves. `option`
    is the flag that the engine makes such an override of, empty for an `-ot`.
    """

    number: int
    pattern: str
    buffer: str
    matched: int
    won: int
    layers: str
    taken_by: dict[int, int]
    option: str = ""


def rule_reports(
    rules: Sequence[Rule], names: Sequence[str], tensors: Sequence[Tensor]
) -> list[RuleReport]:
    """Report every rule (in the engine's order) over all tensors; `names` are GPU buffer names."""
    matched: Counter[int] = Counter()
    won: Counter[int] = Counter()
    layers: dict[int, set[int]] = {}
    taken: dict[int, Counter[int]] = {}
    for t in tensors:
        hits = [i for i, r in enumerate(rules) if r.regex.search(t.name)]
        for i in hits:
            matched[i] += 1
            if i != hits[0]:
                taken.setdefault(i, Counter())[hits[0] + 1] += 1
        if hits:
            won[hits[0]] += 1
            if t.layer is not None:
                layers.setdefault(hits[0], set()).add(t.layer)
    return [
        RuleReport(
            number=i + 1,
            pattern=rule.regex.pattern,
            buffer="CPU" if rule.home == HOST else names[rule.home],
            matched=matched[i],
            won=won[i],
            layers=ranges(layers.get(i, ())),
            taken_by=dict(taken.get(i, {})),
            option=rule.option,
        )
        for i, rule in enumerate(rules)
    ]


def rule_findings(reports: Sequence[RuleReport], tensors: Sequence[Tensor]) -> list[Finding]:
    """Dead and shadowed rules, and the traps of their patterns."""
    findings: list[Finding] = []
    for r in reports:
        label = f"rule {r.number} ({r.option or f'{r.pattern}={r.buffer}'})"
        if r.matched == 0:
            why = "these layers have no experts" if r.option else "no tensor has such a name"
            findings.append(Finding("error", f"{label} never matches: {why}", r.number))
        elif r.won == 0:
            by = ", ".join(f"rule {n}" for n in r.taken_by)
            findings.append(
                Finding(
                    "error",
                    f"{label} never takes effect: all {r.matched} tensors it matches are taken by "
                    f"{by} before it, and the first match wins; put it first",
                    r.number,
                )
            )
        elif r.taken_by:
            by = ", ".join(f"{c} by rule {n}" for n, c in sorted(r.taken_by.items()))
            findings.append(
                Finding(
                    "note",
                    f"{label} is shadowed in part: of {r.matched} tensors it matches, {by} are "
                    f"taken earlier; it moves the other {r.won} (layers {r.layers or '-'})",
                    r.number,
                )
            )
        traps = [] if r.option else _traps(r, tensors)
        findings += [Finding("warning", f"{label}: {x}", r.number) for x in traps]
    return findings


def landing_findings(
    command: CommandLine,
    model: Model,
    kinds: Sequence[GgmlType],
    homes: Homes,
    where: Mapping[str, str],
    names: Sequence[str],
) -> list[Finding]:
    """What is odd about where things land; `names` are device names by engine index."""
    found = _left_in_ram(command, homes) if names else []
    found += _split_pairs(model, where)
    found += _hops(command, model, homes, where, names)
    moved = [
        t.name
        for t in model.tensors
        if t.layer is not None
        and homes.blocks[t.layer] != HOST
        and where.get(t.name) == "CPU"
        and (t.role.startswith("ffn_gate_inp") or t.role.endswith("_norm"))
    ]
    if moved:
        text = f"{len(moved)} router and norm tensors go to RAM with the experts"
        found.append(
            Finding("warning", f"{text} ({moved[0]}, …): about -7 % speed; match exps only")
        )
    in_ram = any(is_expert(t) and where.get(t.name) == "CPU" for t in model.tensors)
    if command.has("rtr") and in_ram and names:
        text = "-rtr repacks experts in RAM to types without CUDA kernels"
        found.append(Finding("warning", f"{text}: prompts are no longer sped up by the GPU"))
    return found + wrong_devices(model, kinds, where)


def wrong_devices(
    model: Model, kinds: Sequence[GgmlType], where: Mapping[str, str]
) -> list[Finding]:
    """Tensors on the wrong kind of device, and up/gate pairs of different types."""
    on_gpu: Counter[str] = Counter()
    slow: Counter[str] = Counter()
    by_name = dict(zip((t.name for t in model.tensors), kinds, strict=True))
    odd: set[int] = set()
    for t, q in zip(model.tensors, kinds, strict=True):
        home = where.get(t.name)
        if home is None or t.role == "token_embd":
            continue
        if home != "CPU" and not q.cuda:
            on_gpu[q.name] += 1
        if home == "CPU" and q.slow_cpu and t.layer is not None:
            slow[q.name] += 1
        twin = by_name.get(t.name.replace("ffn_up_exps", "ffn_gate_exps"))
        if t.role == "ffn_up_exps" and twin is not None and twin is not q and t.layer is not None:
            odd.add(t.layer)
    found = [
        Finding(
            "error",
            f"{n} tensors of type {name} on a GPU: it has no CUDA kernel, so every token copies "
            "them; keep them in RAM",
        )
        for name, n in on_gpu.items()
    ]
    found += [
        Finding("warning", f"{n} tensors of type {name} in RAM: it decodes slowly on a CPU")
        for name, n in slow.items()
    ]
    if odd:
        text = f"layers {ranges(odd)}: ffn_up_exps and ffn_gate_exps differ in type"
        found.append(Finding("warning", f"{text}, so the fused kernel is not used"))
    return found


def _traps(report: RuleReport, tensors: Sequence[Tensor]) -> list[str]:
    """Known traps in the text of a pattern."""
    traps = []
    if (hit := _DIGIT_CLASS.search(report.pattern)) is not None:
        traps.append(
            f"{hit.group(0)} is a class of single digits, not a range of numbers; "
            "write e.g. ([0-9]|10)"
        )
    if _EMPTY_BRANCH.search(report.pattern):
        traps.append("an empty branch of | matches everything: drop the stray |")
    if _OPEN_NUMBER.search(report.pattern):
        traps.append("the layer number is not closed: 1 also matches 10 to 19; end it with \\.")
    traps += _taken_by_more(report, tensors)
    return traps


def _taken_by_more(report: RuleReport, tensors: Sequence[Tensor]) -> list[str]:
    """Traps of wildcards: what a pattern takes beyond what it takes with the dots meant literally.

    A dot that, taken literally, would leave nothing is meant as it stands: `blk.3.ffn.`.
    """
    loose = [t.name for t in tensors if re.search(report.pattern, t.name)]
    traps = []
    closed = _OPEN_INSIDE.sub(r"\1\\.", report.pattern)
    if closed != report.pattern:
        regex = re.compile(closed)
        extra = [name for name in loose if not regex.search(name)]
        if 0 < len(extra) < len(loose):
            traps.append(
                f"the layer number is not closed: it also takes {len(extra)} tensors such as "
                f"{extra[0]}; end it with \\."
            )
    strict = re.sub(r"(?<!\\)\.(?![*+?{])", r"\\.", report.pattern)
    if strict != report.pattern:
        regex = re.compile(strict)
        extra = [name for name in loose if not regex.search(name)]
        if 0 < len(extra) < len(loose):
            traps.append(
                f"a dot without backslash stands for any character: it also matches "
                f"{len(extra)} tensors such as {extra[0]}"
            )
    return traps


def _left_in_ram(command: CommandLine, homes: Homes) -> list[Finding]:
    left = [i for i, d in enumerate(homes.blocks) if d == HOST]
    if not left:
        return []
    given = f"-ngl {command.value('ngl')}" if command.has("ngl") else "no -ngl:"
    text = f"{given} leaves layers {ranges(left)} in RAM, KV cache included"
    return [Finding("warning", f"{text}: -ngl 999 is faster where all layers fit")]


def _split_pairs(model: Model, where: Mapping[str, str]) -> list[Finding]:
    split = [
        t.layer
        for t in model.tensors
        if t.role == "ffn_up_exps"
        and t.layer is not None
        and where.get(t.name) != where.get(t.name.replace("ffn_up_exps", "ffn_gate_exps"))
    ]
    if not split:
        return []
    text = f"layers {ranges(split)}: ffn_up_exps and ffn_gate_exps are on different devices"
    return [Finding("error", f"{text}; measured 5 to 9 times slower, keep them together")]


def _hops(
    command: CommandLine,
    model: Model,
    homes: Homes,
    where: Mapping[str, str],
    names: Sequence[str],
) -> list[Finding]:
    """Layers whose attention and KV are on one GPU and whose FFN is on another."""
    apart: dict[tuple[str, str], set[int]] = {}
    for t in model.tensors:
        if t.layer is None or not t.role.startswith("ffn_down") or homes.blocks[t.layer] == HOST:
            continue
        here, there = names[homes.blocks[t.layer]], where.get(t.name, "CPU")
        if there not in ("CPU", here):
            apart.setdefault((here, there), set()).add(t.layer)
    if not apart:
        return []
    count = len(set().union(*apart.values()))
    detail = "; ".join(f"layers {ranges(v)} {a} → {b}" for (a, b), v in apart.items())
    why = (
        "-ts does not follow the overrides"
        if command.has("ts")
        else "without -ts the layers are split by free memory"
    )
    return [
        Finding(
            "warning",
            f"{count} layers have attention and KV cache on one GPU and FFN on another ({detail}): "
            f"-ot moves weights only, {why}; every token crosses the bus twice per such layer",
        )
    ]
