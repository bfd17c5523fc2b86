"""`python -m quantmix.loss.fit.by_size --measurements CSV`: mixes that follow from name and size.

One author names his files after the type of ffn_gate_exps and ffn_up_exps; `smol-` means that
ffn_down_exps has it too (https://huggingface.co/ubergarm/Kimi-K2-Instruct-0905-GGUF), else they
have one of the types that he pairs with it where his pages say the mix. All else lies between four
and eight bits. Published bits per weight have three decimals: of all such mixes few have them, and
where all that do agree on ffn_down_exps, the experts are known. What remains open about the rest
moves damage by little: the reading with the median damage is written, and none where quartiles lie
more than 5 % from it.

Wherever a page says the mix, this method finds the same experts or none (a test checks it), with
the pairs of the other models.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

from quantmix.ggml.types import resolve
from quantmix.loss import curve, evidence, prior
from quantmix.loss.fit import command, curate
from quantmix.loss.mixes import curve_name
from quantmix.models.model import Model
from quantmix.models.sources import load_model

COLUMNS: Final = ("model", "label", "mix", "source")
_NAME: Final = re.compile(r"^(smol-)?(I?Q\d_[A-Z]+) \(ubergarm\)$")
_ROUNDING: Final = 0.00051
_AGREE: Final = 0.05
# Its files are a test of mixes never seen (tests/bench/bench_unseen.py): they calibrate nothing.
_A_TEST: Final = frozenset({"deepseek-r1-0528"})

# What he gives the tensors that are no experts, by class; pairs belong together.
_ATTENTION: Final = ("q8_0", "iq6_k", "iq5_k", "iq5_ks", "iq4_ks", "iq4_kt")
_LARGE_ATTENTION: Final = ("iq6_k", "iq5_ks", "iq4_ks")
_KV_B: Final = ("q8_0", "q6_0", "q5_0")
_FFN: Final = (
    ("q8_0", "q8_0"), ("iq6_k", "iq6_k"), ("iq5_k", "iq6_k"), ("iq5_k", "iq5_k"),
    ("iq5_ks", "iq5_ks"), ("iq4_ks", "iq5_ks"),
)  # fmt: skip
_EMBEDDING: Final = ("q8_0", "iq6_k", "iq4_k", "iq4_kt")
_HEAD: Final = ("q8_0", "iq6_k")
_NEXTN: Final = ("q8_0", "iq6_k", "iq5_ks", "iq4_ks")

_KEYS: Final = {
    "gate_up": ("ffn_gate_exps", "ffn_up_exps"),
    "down": ("ffn_down_exps",),
    "attn": ("attn",),
    "attn_output": ("attn_output",),
    "attn_q": ("attn_q", "attn_q_b"),
    "kv_b": ("attn_k_b", "attn_v_b"),
    "ffn": ("ffn",),
    "ffn_down": ("ffn_down", "ffn_down_shexp"),
    "token_embd": ("token_embd",),
    "output": ("output",),
}


@dataclass(frozen=True)
class Reading:
    """One mix that has the size: type by class (`_KEYS`)."""

    types: Mapping[str, str]

    @property
    def down(self) -> str:
        """Type of ffn_down_exps."""
        return self.types["down"]

    def mix(self) -> str:
        """The text of `quantmix.loss.mixes`."""
        return ";".join(
            f"{key}={qtype}" for c, qtype in self.types.items() for key in _KEYS.get(c, ())
        )


def pairs_of(mixes: Iterable[str]) -> dict[str, set[str]]:
    """Return by type of ffn_gate_exps the types of ffn_down_exps that go with it in `mixes`."""
    out: dict[str, set[str]] = {}
    for mix in mixes:
        items = dict(item.partition("=")[::2] for item in mix.split(";"))
        gate, down = items.get("ffn_gate_exps", ""), items.get("ffn_down_exps", "")
        if gate.isidentifier() and down.isidentifier() and gate != down:
            out.setdefault(curve_name(gate), set()).add(curve_name(down))
    return out


def readings(model: Model, label: str, bpw: float, pairs: Mapping[str, set[str]]) -> list[Reading]:
    """Return all mixes that a file of this name may be and that have its bits per weight.

    Args:
        label: as published, `smol-IQ2_KS (ubergarm)`; other forms have no readings.
        bpw: to three decimals, over all weights of the file.
        pairs: see `pairs_of`.
    """
    match = _NAME.match(label)
    if match is None:
        return []
    experts = curve_name(match.group(2))
    downs = {experts} if match.group(1) else set(pairs.get(experts, ()))
    if not match.group(1):
        downs |= {t.exact_type for t in model.tensors if t.exact_type}
    sizes = _Sizes(model)
    wanted, slack = bpw * model.n_elements / 8, _ROUNDING * model.n_elements / 8
    found = []
    for down in sorted(downs):
        for rest in _rests(sizes.classes):
            types = {"gate_up": experts, "down": down, **rest}
            total = sizes.fixed_bytes + sum(sizes.of(c, q) for c, q in types.items())
            if abs(total - wanted) <= slack:
                found.append(Reading({c: q for c, q in types.items() if c in sizes.classes}))
    return found


def middle(model: Model, found: Sequence[Reading]) -> Reading | None:
    """Return the reading with the median damage; None unless all agree on experts and damage."""
    if len({r.down for r in found}) != 1:
        return None
    by_class: dict[str, float] = defaultdict(float)
    for t, share in zip(model.tensors, prior.shares(model), strict=True):
        by_class[_class(t.role)] += float(share)

    def damage(r: Reading) -> float:
        gains = ((by_class[c], curve.gain_of(curve_name(q)).gain) for c, q in r.types.items())
        return sum(share * gain for share, gain in gains)

    ranked = sorted(found, key=lambda r: (damage(r), r.mix()))
    low, mid, high = (ranked[len(ranked) * k // 4] for k in (1, 2, 3))
    spread = max(damage(high) / damage(mid), damage(mid) / damage(low)) - 1.0
    return mid if spread <= _AGREE else None


def _rests(classes: frozenset[str]) -> Iterator[dict[str, str]]:
    """Return what the tensors that are no experts may have; absent classes take one value."""
    kv_b = _KV_B if "kv_b" in classes else _KV_B[:1]
    nextn = _NEXTN if "nextn" in classes else _NEXTN[:1]
    for attn, kv, (ffn, ffn_down), embd, head, mtp in product(
        _ATTENTION, kv_b, _FFN, _EMBEDDING, _HEAD, nextn
    ):
        large = {(attn, attn), (attn, "iq6_k"), *((q, q) for q in _LARGE_ATTENTION)}
        for query, output in sorted(large):
            yield {
                "attn": attn, "attn_q": query, "attn_output": output, "kv_b": kv, "ffn": ffn,
                "ffn_down": ffn_down, "token_embd": embd, "output": head, "nextn": mtp,
            }  # fmt: skip


class _Sizes:
    """Bytes of each class of tensors at each type, counted once."""

    def __init__(self, model: Model) -> None:
        self._members: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self.fixed_bytes = 0
        for t in model.tensors:
            if t.quantizable:
                self._members.setdefault(_class(t.role), []).append((t.name, t.shape))
            else:
                self.fixed_bytes += 4 * t.n_elements
        self._bytes: dict[tuple[str, str], int] = {}

    @property
    def classes(self) -> frozenset[str]:
        return frozenset(self._members)

    def of(self, name: str, qtype: str) -> int:
        """Return the bytes of a class at a type, after the engine's fallbacks."""
        key = (name, qtype)
        if key not in self._bytes:
            self._bytes[key] = sum(
                resolve(qtype, tensor, shape).tensor_bytes(shape)
                for tensor, shape in self._members.get(name, ())
            )
        return self._bytes[key]


def _class(role: str) -> str:
    if role.endswith("_exps"):
        return "down" if role == "ffn_down_exps" else "gate_up"
    if role in ("token_embd", "output", "attn_output"):
        return role
    if role in ("attn_q", "attn_q_b"):
        return "attn_q"
    if role in ("attn_k_b", "attn_v_b"):
        return "kv_b"
    if role.startswith("nextn"):
        return "nextn"
    if role.startswith("ffn"):
        return "ffn_down" if "down" in role else "ffn"
    return "attn"


def main() -> None:
    """Write `by_size.csv` for every measured file without a mix whose experts follow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, required=True, help="CSV of measurements")
    rows = evidence.raw_rows(parser.parse_args().measurements)
    pairs = pairs_of(curate.pages().values())
    out = []
    for row in curate.curate(rows, by_size=False):
        if row["mix"] or not row["bpw"] or row["imatrix"] == "no" or row["model"] in _A_TEST:
            continue
        model = load_model(row["model"])
        found = readings(model, row["label"], float(row["bpw"]), pairs)
        reading = middle(model, found)
        if reading is not None:
            out.append((row["model"], row["label"], reading.mix(), row["source"]))
    file = Path(__file__).with_name("by_size.csv")
    with file.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(sorted(out))


if __name__ == "__main__":
    command(main)
