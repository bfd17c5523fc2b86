"""The table that a model card needs, as Markdown to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantmix.report.words import say


def card_table(section: Mapping[str, Any]) -> str:
    """Return recipes with size and perplexity: measured where it was, else as predicted.

    A measured row is preferred when it carries the recipe's name.
    """
    measured = {m["label"]: m for m in section["measured"]}
    with_kld = any(m["kld"] is not None for m in measured.values())
    head = ["recipe", "size", "bpw", "PPL", "rise", *(["KLD"] if with_kld else []), "basis"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 2) + "|---|"]
    for r in section["recipes"]:
        m = measured.get(r["name"])
        cells = [r["name"], say(r["size"]["tensor_bytes"], "gib"), say(r["size"]["bpw"], "bpw")]
        if m is not None:
            error = "" if m["ppl_err"] is None else f" ± {m['ppl_err']:.4f}"
            cells += [say(m["ppl"], "ppl") + error, say(m["ln_ppl_ratio"], "rise")]
            cells += [say(m["kld"], "nats")] if with_kld else []
            cells.append("measured")
        else:
            q = r["quality"]
            low, high = q["ln_ppl_ratio_low"], q["ln_ppl_ratio_high"]
            band = "" if low is None else f" [{say(low, 'rise')}, {say(high, 'rise')}]"
            cells += [say(q["ppl"], "ppl"), say(q["ln_ppl_ratio"], "rise") + band]
            cells += ["–"] if with_kld else []
            cells.append(f"predicted ({q['basis']})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mix_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the mix role by role: types, size, share of the damage."""
    lines = ["| tensors | types | size | damage |", "|---|---|---:|---:|"]
    lines += [
        f"| {r['role']} | {r['types']} | {say(r['bytes'], 'gib')} "
        f"| {say(r['damage_share'], 'share')} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"
