"""What a mix that exists already will be: size, damage, perplexity, role by role."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantmix.assemble import size_of
from quantmix.emit.parse_rules import resolve_rules
from quantmix.errors import BadFile, UnknownName, UsageError
from quantmix.ggml.types import Engine, GgmlType, get, resolve
from quantmix.loss import load as load_loss
from quantmix.loss.model import LossModel
from quantmix.models.model import Model, Tensor
from quantmix.recipe import PlannedTensor, Quality, Size

_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Prediction:
    """Size, quality and what each role takes of both.

    Attributes:
        roles: per role its damage in nats and its bytes, largest damage first.
        unmatched: quantizable tensors that the recipe does not mention, kept as in the source.
        fallbacks: (tensor, asked, written) where the engine would write another type.
    """

    size: Size
    quality: Quality
    roles: dict[str, dict[str, float | int]]
    unmatched: tuple[str, ...]
    fallbacks: tuple[tuple[str, str, str], ...]
    types: tuple[str, ...]


def predict(
    model: Model,
    asked: Mapping[str, str],
    *,
    engine: Engine = "ik",
    imatrix: bool = True,
    loss: LossModel | None = None,
) -> Prediction:
    """Predict the mix that gives each tensor the type `asked` for (by name).

    Raises:
        UnknownName: a type that the engine does not know.
        UsageError: a type that cannot be written to a tensor.
    """
    loss = loss or load_loss(model, engine=engine, imatrix=imatrix)
    mix: list[GgmlType | None] = []
    planned, unmatched, fallbacks = [], [], []
    for tensor in model.tensors:
        qtype = _written(tensor, asked, engine)
        if qtype is None and tensor.quantizable and tensor.loaded and tensor.name not in asked:
            unmatched.append(tensor.name)
        if qtype is not None and qtype.name != asked[tensor.name]:
            fallbacks.append((tensor.name, asked[tensor.name], qtype.name))
        mix.append(qtype)
        planned.append(_plan(tensor, qtype, engine))
    return Prediction(
        size=size_of(model, planned),
        quality=loss.quality(model, mix),
        roles=_roles(model, planned, mix, loss),
        unmatched=tuple(unmatched),
        fallbacks=tuple(fallbacks),
        types=tuple(p.type for p in planned),
    )


def uniform(model: Model, name: str, engine: Engine = "ik") -> dict[str, str]:
    """Return every quantizable tensor of `model` at one type.

    Raises:
        UnknownName: the engine has no such type.
    """
    get(name, engine)
    return {t.name: name for t in model.tensors if t.quantizable}


def read_mix(path: Path, model: Model, engine: Engine = "ik") -> dict[str, str]:
    """Return the types of a recipe of ours, of `regex=type` lines, or of a GGUF, by tensor name.

    Raises:
        BadFile: nothing there, or none of the three.
        UsageError: a line is no rule, or no tensor of `model` is in it.
    """
    if path.is_dir() or path.name == "recipe.json":
        from quantmix.recipe import load

        types = {t.name: t.type for t in load(path).tensors}
    elif _is_gguf(path):
        from quantmix.models.sources import load_model

        types = {t.name: t.source_type for t in load_model(str(path)).tensors}
    else:
        types = resolve_rules(_lines(path), model, engine)
    known = {t.name: t for t in model.tensors}
    found = {n: q for n, q in types.items() if n in known and known[n].quantizable}
    if not found:
        raise UsageError(f"{path} gives no type to any tensor of {model.id}: is it for that model?")
    return found


def _written(tensor: Tensor, asked: Mapping[str, str], engine: Engine) -> GgmlType | None:
    """Return the type the engine would write; None when the tensor stays as it is."""
    name = asked.get(tensor.name)
    if name is None or not tensor.quantizable:
        return None
    return resolve(name, tensor.name, tensor.shape, engine)


def _plan(tensor: Tensor, qtype: GgmlType | None, engine: Engine) -> PlannedTensor:
    kept = qtype or _source_type(tensor, engine)
    return PlannedTensor(
        name=tensor.name,
        shape=tensor.shape,
        role=tensor.role,
        layer=tensor.layer,
        type=kept.name,
        bytes=kept.tensor_bytes(tensor.shape),
        device="",
        damage=0.0,
    )


def _source_type(tensor: Tensor, engine: Engine) -> GgmlType:
    try:
        return get(tensor.source_type, engine)
    except UnknownName:
        return get("bf16", engine)


def _roles(
    model: Model,
    planned: Sequence[PlannedTensor],
    mix: Sequence[GgmlType | None],
    loss: LossModel,
) -> dict[str, dict[str, float | int]]:
    types = {q.name: q for q in mix if q is not None}
    cells = loss.damage(model, list(types.values()))
    column = {n: j for j, n in enumerate(types)}
    roles: dict[str, dict[str, float | int]] = {}
    for i, (tensor, plan, qtype) in enumerate(zip(model.tensors, planned, mix, strict=True)):
        role = roles.setdefault(tensor.role, {"damage": 0.0, "bytes": 0})
        role["bytes"] += plan.bytes
        if qtype is not None:
            role["damage"] += float(cells[i, column[qtype.name]])
    return dict(sorted(roles.items(), key=lambda r: (-r[1]["damage"], -r[1]["bytes"], r[0])))


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as f:
            return f.read(4) == _GGUF_MAGIC
    except OSError as err:
        raise BadFile(f"no recipe at {path}: {err.strerror}") from None


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise BadFile(f"{path} is no recipe, rules or GGUF: {err}") from err
    if text.lstrip().startswith("{"):
        try:
            doc = json.loads(text)
        except ValueError as err:
            raise BadFile(f"{path} is not JSON: {err}") from err
        return [str(rule) for rule in doc.get("rules", ())]
    return text.splitlines()
