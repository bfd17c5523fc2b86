"""What a mix that exists already will be: size, damage, perplexity, role by role."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantmix.assemble import size_of
from quantmix.engine import presets
from quantmix.errors import BadFile, UnknownName, UsageError
from quantmix.ggml.header import is_gguf
from quantmix.ggml.types import Engine, GgmlType, get, resolve
from quantmix.loss import load as load_loss
from quantmix.loss.model import LossModel, mix_damage
from quantmix.loss.quality import Quality
from quantmix.models.model import Model, Tensor
from quantmix.recipe import PlannedTensor, Size
from quantmix.rule_lines import resolve_rules


@dataclass(frozen=True)
class Prediction:
    """Size, quality and what each role takes of both.

    Attributes:
        roles: per role its damage in nats and its bytes, largest damage first.
        unmatched: quantizable tensors that the recipe does not mention, kept as in the source.
        fallbacks: (tensor, asked, written) where the engine would write another type.
        types: of every tensor of the file, in its order.
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
    foreign: bool = False,
) -> Prediction:
    """Predict the mix that gives each tensor the type `asked` for (by name).

    A `foreign` mix is somebody else's: where its types alternate from layer to layer, its author
    is taken to have known the tensors (`quantmix.loss.solved`).

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
        mix.append(qtype or _lost_already(tensor, engine))
        planned.append(_plan(tensor, qtype, engine))
    quality = loss.quality(model, mix)
    if foreign:
        loss, quality = _by_somebody(model, mix, loss, quality)
    return Prediction(
        size=size_of(model, planned),
        quality=quality,
        roles=_roles(model, planned, mix, loss),
        unmatched=tuple(unmatched),
        fallbacks=tuple(fallbacks),
        types=tuple(p.type for p in planned),
    )


def uniform(
    model: Model, name: str, engine: Engine = "ik", *, imatrix: bool = True
) -> dict[str, str]:
    """Return every quantizable tensor of `model` at one type, or as a preset makes it.

    Raises:
        UnknownName: the engine has no such type.
        UsageError: it cannot write it.
        EngineMissing, EngineError: a preset, and no engine that tells what it is.
    """
    if presets.is_preset(name, engine):
        return presets.types_of(model, name, engine, imatrix=imatrix)
    _require_writable([name], engine)
    return {t.name: name for t in model.tensors if t.quantizable}


def read_mix(path: Path, model: Model, engine: Engine = "ik") -> dict[str, str]:
    """Return the types of a recipe of ours, of `regex=type` lines, or of a GGUF, by tensor name.

    Raises:
        BadFile: nothing there, or none of the three.
        UsageError: a line is no rule or names a type that the engine cannot write, or no tensor of
            `model` is in it.
    """
    if is_ours(path):
        from quantmix.recipe import load

        recipe = load(path)
        same = {t.name: t.shape for t in recipe.tensors} == {t.name: t.shape for t in model.tensors}
        if recipe.model.id != model.id and not same:
            raise UsageError(f"{path} is a recipe for {recipe.model.id}, not for {model.id}")
        types = {t.name: t.type for t in recipe.tensors}
    elif _holds_gguf(path):
        from quantmix.models.sources import load_model

        types = {t.name: t.source_type for t in load_model(str(path)).tensors}
    else:
        types = resolve_rules(_lines(path), model, engine, source=str(path))
        _require_writable(types.values(), engine)
    known = {t.name: t for t in model.tensors}
    found = {n: q for n, q in types.items() if n in known and known[n].quantizable}
    if not found:
        raise UsageError(f"{path} gives no type to any tensor of {model.id}: is it for that model?")
    return found


def _require_writable(names: Iterable[str], engine: Engine) -> None:
    for name in names:
        if not get(name, engine).writable:
            raise UsageError(f"{engine} knows {name} but cannot write it: see `quantmix types`")


def is_ours(path: Path) -> bool:
    """Whether `path` is a recipe of ours (a folder or its recipe.json), as `read_mix` takes it."""
    return path.is_dir() or path.name == "recipe.json"


def _by_somebody(
    model: Model, mix: Sequence[GgmlType | None], loss: LossModel, plain: Quality
) -> tuple[LossModel, Quality]:
    """Return the loss model and quality of a mix whose author may have known every tensor.

    The upper end of the interval stays where it is without that assumption, if that is higher.
    """
    from quantmix.loss.predictor import FittedModel

    if not isinstance(loss, FittedModel):
        return loss, plain
    knowing = loss.of_somebody(model, mix)
    if knowing is loss:
        return loss, plain
    quality = knowing.quality(model, mix)
    note = (
        "types alternate from layer to layer, as where each tensor was measured first: such "
        "recipes measure better than depth tells "
        f"(were it chance: PPL {math.expm1(plain.ln_ppl_ratio):+.1%} over the unquantized model)"
    )
    quality = replace(
        quality,
        ppl_high=_higher(quality.ppl_high, plain.ppl_high),
        ln_ppl_ratio_high=_higher(quality.ln_ppl_ratio_high, plain.ln_ppl_ratio_high),
        warnings=(*quality.warnings, note),
    )
    return knowing, quality


def _higher(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else max(one, other)


def _written(tensor: Tensor, asked: Mapping[str, str], engine: Engine) -> GgmlType | None:
    """Return the type the engine would write; None when the tensor stays as it is."""
    name = asked.get(tensor.name)
    if name is None or not tensor.quantizable:
        return None
    return resolve(name, tensor.name, tensor.shape, engine)


def _lost_already(tensor: Tensor, engine: Engine) -> GgmlType | None:
    """Return the type of a kept tensor whose source is quantized: what it cost counts too."""
    kind = _source_type(tensor, engine)
    return kind if tensor.quantizable and tensor.loaded and kind.is_quantized else None


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
    damage = mix_damage(loss, model, mix)
    roles: dict[str, dict[str, float | int]] = {}
    for tensor, plan, value in zip(model.tensors, planned, damage, strict=True):
        role = roles.setdefault(tensor.role, {"damage": 0.0, "bytes": 0})
        role["bytes"] += plan.bytes
        role["damage"] += float(value)
    return dict(sorted(roles.items(), key=lambda r: (-r[1]["damage"], -r[1]["bytes"], r[0])))


def _holds_gguf(path: Path) -> bool:
    try:
        return is_gguf(path)
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
        rules = doc.get("rules")
        if not isinstance(rules, list) or not all(isinstance(r, str) for r in rules):
            raise BadFile(f"{path} has no list `rules` of regex=type lines")
        return rules
    return text.splitlines()
