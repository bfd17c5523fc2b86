"""Mixes as people publish them: `attn=q8_0;ffn_down_exps=iq4_ks[3-8]+iq3_k;rest=iq5_ks`.

Items are `key=value` joined by `;`, a specific key overriding a general one. A value is a type,
or parts joined by `+`: `type*n` (n tensors of that class, which ones is not said), `type[3-8]`
(those layers; a part without layers is the rest). `key[0-1]=…` is an item for those layers only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from quantmix.errors import UsageError
from quantmix.ggml.types import ENGINES, table
from quantmix.loss import curve
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model, Tensor

_KEY: Final = re.compile(r"^([a-z0-9_.]+)(?:\[([\d ,+-]+)\])?$")
_PART: Final = re.compile(r"^([A-Za-z0-9_]+)(?:\*(\d+)|\[([\d ,+-]+)\])?$")
_SPAN: Final = re.compile(r"^(\d{1,4})(?:-(\d{1,4}))?$")
_FLOATS: Final = frozenset({"f32", "f16", "bf16"})

_MAY_BE_OPEN: Final = 0.25
_UNMENTIONED: Final = "q6_K"

# What llama-quantize's own heuristics give where an item says `ftype:q4_0` (llama-quantize.cpp).
_FTYPES: Final = {"ftype:q4_0": {"rest": "q4_0", "output": "q6_K"}}


@dataclass(frozen=True, slots=True)
class _Item:
    layers: frozenset[int] | None
    chances: tuple[tuple[str, float, frozenset[int] | None], ...]


def resolve(
    model: Model, text: str, share: FloatArray | None = None
) -> list[Mapping[str, float] | None]:
    """Return per tensor the chance of each type (None: not quantizable, or not loaded).

    Type names are those of the type curve (interleaved types mostly under their base). Publishers
    name what they made small and leave out what stayed large: given the sensitivity `share` of each
    tensor, what a mix does not mention is taken as q6_K when all of it together has at most a
    quarter. Recurrent tensors follow attention unless named.

    Raises:
        UsageError: the text is not a mix, or leaves open what matters.
    """
    items = _parse(text)
    out: list[Mapping[str, float] | None] = []
    open_share, open_name = 0.0, ""
    for i, tensor in enumerate(model.tensors):
        if not (tensor.quantizable and tensor.loaded):
            out.append(None)
            continue
        item = _best(items, tensor)
        if item is not None:
            out.append(_chances(item, tensor))
            continue
        out.append({_UNMENTIONED: 1.0})
        open_share += 1.0 if share is None else float(share[i])
        open_name = open_name or tensor.name
        if open_share > _MAY_BE_OPEN:
            raise UsageError(f"mix {text!r} does not say what {open_name} is")
    return out


def keys_of(role: str) -> tuple[str, ...]:
    """Return the keys that name a role, most specific first."""
    keys = [role]
    for ending in ("exps", "shexp"):
        if role.endswith("_" + ending):
            part = role.removesuffix("_" + ending).removeprefix("ffn_")
            if part in ("gate", "up"):
                keys.append(f"ffn_gate_up_{ending}")
            keys.append("ffn_exps" if ending == "exps" else "shexp")
    if role in ("ffn_gate", "ffn_up", "ffn_down"):
        part = role.removeprefix("ffn_")
        keys.append(f"ffn_dense_{part}")
        if part != "down":
            keys.append("ffn_dense_gate_up")
        keys.append("ffn_dense")
    if role.startswith("ffn"):
        keys.append("ffn")
    if role.startswith("attn"):
        keys.append("attn")
    if role.startswith("ssm"):
        keys += ["ssm", "attn_qkv", "attn"]
    return (*keys, "default", "rest", "all")


def _best(items: Mapping[str, list[_Item]], tensor: Tensor) -> _Item | None:
    for key in keys_of(tensor.role):
        fitting = [i for i in items.get(key, ()) if i.layers is None or tensor.layer in i.layers]
        if fitting:
            return min(fitting, key=lambda i: i.layers is None)
    return None


def _chances(item: _Item, tensor: Tensor) -> dict[str, float]:
    for name, _, layers in item.chances:
        if layers is not None and tensor.layer in layers:
            return {name: 1.0}
    free = [(name, n) for name, n, layers in item.chances if layers is None]
    total = sum(n for _, n in free)
    if total <= 0.0:
        raise UsageError(f"no type of the mix is for layer {tensor.layer} of {tensor.role}")
    chances: dict[str, float] = {}
    for name, n in free:
        chances[name] = chances.get(name, 0.0) + n / total
    return chances


def _parse(text: str) -> dict[str, list[_Item]]:
    items: dict[str, list[_Item]] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        key, sep, value = part.partition("=")
        match = _KEY.match(key.strip())
        if not sep or match is None:
            raise UsageError(f"mix item {part!r} is not key=type")
        values = _FTYPES.get(value.strip(), {match.group(1): value.strip()})
        for name, types in values.items():
            layers = _layers(match.group(2)) if match.group(2) else None
            items.setdefault(name, []).append(_Item(layers, _types(types)))
    if not items:
        raise UsageError(f"{text!r} is not a mix")
    return items


def _types(text: str) -> tuple[tuple[str, float, frozenset[int] | None], ...]:
    parts = []
    for piece in re.split(r"\+(?![^\[]*\])", text):
        match = _PART.match(piece.strip())
        if match is None:
            raise UsageError(f"{piece!r} is not a type, type*n or type[layers]")
        layers = _layers(match.group(3)) if match.group(3) else None
        parts.append((curve_name(match.group(1)), float(match.group(2) or 1), layers))
    return tuple(parts)


def curve_name(text: str) -> str:
    """Return the curve name of a type as people write it, any case.

    Raises:
        UsageError: neither engine knows the type.
    """
    for engine in ENGINES:
        types = table(engine)
        for qtype in (types.get(text), *(t for n, t in types.items() if n.lower() == text.lower())):
            if qtype is not None:
                return qtype.name if qtype.name in _FLOATS else curve.own_name(qtype)
    raise UsageError(f"mix names the type {text!r}, which no engine knows")


def _layers(text: str) -> frozenset[int]:
    """Return the layers of a list like `0-3,7`."""
    out: set[int] = set()
    for piece in re.split(r"[ ,+]+", text.strip()):
        match = _SPAN.match(piece)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"[{text}] names no layers: write [3], [3-8] or [0-3,7]")
        out.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(out)
