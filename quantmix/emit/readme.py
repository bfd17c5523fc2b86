"""The README of a recipe: what a person would publish on a model card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import expm1
from typing import TYPE_CHECKING, Any

from quantmix.emit.rules import section_of
from quantmix.emit.scripts import shell_line
from quantmix.ggml.types import FLOATS
from quantmix.sources import CREDIT
from quantmix.units import gib

if TYPE_CHECKING:
    from quantmix.loss.quality import Quality
    from quantmix.recipe import Recipe


def readme(recipe: Recipe) -> str:
    """Return the README in Markdown."""
    size = recipe.size
    lines = [
        f"# {recipe.name}",
        "",
        f"A quantization mix of **{recipe.model.id}** ({recipe.model.layout} layout, "
        f"{recipe.model.n_tensors} tensors) for {recipe.budget.get('label', 'a budget')}, "
        f"made by quantmix {recipe.quantmix} for {_engine_name(recipe)}.",
        "",
        "| | |",
        "|---|---|",
        f"| Size | {gib(size.tensor_bytes)} of tensors, {size.bpw:.4f} bits per weight |",
        f"| Quality | {quality_text(recipe.quality)} |",
        *([f"| Measured | {refined_text(recipe.refined)} |"] if recipe.refined else []),
        f"| Context | {recipe.settings.ctx}, KV {recipe.settings.ctk}/{recipe.settings.ctv} |",
        f"| Proven | {_proof(recipe)} |",
    ]
    if recipe.speed.tg_tps is not None:
        lines.append(f"| Speed | predicted {recipe.speed} |")
    lines += ["", "## The mix", "", "| tensors | type | GiB |", "|---|---|---|"]
    lines += [f"| {role} | {types} | {gib(n)} |" for role, types, n in mix_rows(recipe)]
    if recipe.devices:
        lines += ["", "## Memory", "", _memory_table(recipe), "", "![memory](memory.png)"]
    lines += ["", "![types](types.png)", "", "## Quantize", "", "```bash"]
    lines += [f"./quantize.sh {recipe.quantize_arguments}", "```"]
    if recipe.offload.get("flags"):
        serve = shell_line(recipe.offload["env"], recipe.commands["serve"])
        lines += ["", "## Serve", "", "```bash", serve, "```"]
        lines += [f"\n{note[0].upper()}{note[1:]}." for note in recipe.offload.get("notes", [])]
    if recipe.quality.warnings:
        lines += ["", "## Warnings", "", *(f"- {w}" for w in recipe.quality.warnings)]
    lines += ["", "---", "", CREDIT, ""]
    return "\n".join(lines)


def quality_text(q: Quality) -> str:
    """Return predicted quality in words, never a bare number."""
    low, high = q.ln_ppl_ratio_low, q.ln_ppl_ratio_high
    rise = f"PPL {100 * expm1(q.ln_ppl_ratio):+.2f}%"
    if low is not None and high is not None:
        rise += f" [{100 * expm1(low):+.2f}%, {100 * expm1(high):+.2f}%]"
    text = f"predicted {rise} at {q.interval:.0%}"
    if q.ppl is not None:
        text = (
            f"predicted PPL {q.ppl:.4f} [{q.ppl_low:.4f}, {q.ppl_high:.4f}] at {q.interval:.0%} "
            f"(base {q.ppl_base:.4f}, {rise})"
        )
    return f"{text}; basis: {q.basis}"


def refined_text(refined: Mapping[str, Any]) -> str:
    """Return in words what `refine` measured on chunks that chose nothing."""
    return (
        f"KLD {refined['kld']:.5f} ± {refined['kld_err']:.5f} nats on {refined['chunks']} held-out "
        f"chunks of {refined['n_ctx']} tokens, {refined['difference']:+.5f} ± "
        f"{refined['difference_err']:.5f} (paired) against {refined['from']}, from which "
        f"{refined['swaps']} tensors differ"
    )


def mix_rows(recipe: Recipe) -> list[tuple[str, str, int]]:
    """Return (role, types with layers counted, bytes), in the order of the recipe's sections."""
    by_role: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    n_bytes: dict[str, int] = defaultdict(int)
    for t in recipe.tensors:
        role = t.role if t.type not in FLOATS else "kept as they are"
        by_role[role][t.type] += 1
        n_bytes[role] += t.bytes
    rows = []
    for role in sorted(by_role, key=lambda r: (r == "kept as they are", section_of(r), r)):
        counts = sorted(by_role[role].items(), key=lambda kv: -kv[1])
        single = len(counts) == 1
        types = ", ".join(name if single else f"{name} ×{n}" for name, n in counts)
        rows.append((role, types, n_bytes[role]))
    return rows


def _engine_name(recipe: Recipe) -> str:
    name = "ik_llama.cpp" if recipe.engine.name == "ik" else "llama.cpp"
    return f"{name} (build {recipe.engine.build})"


def _proof(recipe: Recipe) -> str:
    o = recipe.optimality
    if recipe.refined:
        gap = "better than the recipe it came from, as measured; no bound is proven"
    elif o.holds_for.startswith("nothing"):
        gap = "types as they were given: nothing was searched, no bound is proven"
    else:
        gap = f"within {o.gap:.1e} of the proven bound"
    if o.given_for_speed:
        gap += f" before {o.given_for_speed:.5f} nats were given for speed"
    check = recipe.check or {}
    if not check.get("engine"):
        return f"{gap}; not checked by an engine"
    return f"{gap}; {check['tensors_compared']} tensors checked by {check['engine']}"


def _memory_table(recipe: Recipe) -> str:
    head = "| device | weights | KV | built at load | compute | reserve | free | capacity |"
    lines = [head, "|---" * 8 + "|"]
    for d in recipe.devices:
        cells = (d.weights_bytes, d.kv_bytes, d.derived_bytes, d.compute_bytes, d.reserve_bytes)
        free = "" if d.free_bytes is None else gib(d.free_bytes)
        capacity = "" if d.capacity_bytes is None else gib(d.capacity_bytes)
        row = " | ".join(gib(c) for c in cells)
        lines.append(f"| {d.name} | {row} | {free} | {capacity} |")
    return "\n".join(lines)
