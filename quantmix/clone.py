"""Recipes from what exists: the types of a GGUF, or the rules that another tool wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from quantmix.assemble import assemble
from quantmix.budget import make_settings
from quantmix.errors import BadFile, UsageError
from quantmix.files import require_name
from quantmix.ggml.header import tensor_bytes
from quantmix.ggml.types import Engine, GgmlType, by_id, get, resolve
from quantmix.loss.model import LossModel
from quantmix.models.catalog import is_known
from quantmix.models.inspect import stored_type
from quantmix.models.model import Model, Tensor
from quantmix.recipe import Optimality, PlannedTensor, Recipe
from quantmix.rule_lines import resolve_rules
from quantmix.speed.prediction import Speed

_MAX_RULES_BYTES: Final = 16 << 20
_SOURCE: Final = re.compile(r"[^\s\"'=]+\.gguf", re.IGNORECASE)
# What file names add to the name of a model: `-256x21B-BF16-00001-of-00030.gguf`.
_SOURCE_FORM: Final = re.compile(
    r"(-\d+x[\d.]+[BM])?(-(BF16|F16|F32|FP8))?(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE
)
_MODEL_LINE: Final = re.compile(r"^#+\s*Model(?: name)?:\s*(\S+)\s*$", re.MULTILINE)


def clone(model: Model, engine: Engine = "ik", name: str = "") -> Recipe:
    """Return the recipe that gives a source of this model the types that `model` (a GGUF) has.

    Raises:
        UsageError: `engine` cannot write one of its types, or `name` cannot be a folder.
    """
    types = {t.name: _spelled(t.source_type, engine) for t in model.tensors}
    written = {}
    for t in model.tensors:
        if t.quantizable:
            written[t.name] = _written(t, types[t.name], engine)
            if written[t.name].name != types[t.name]:
                raise UsageError(
                    f"{t.name} is {types[t.name]}, which {engine} would write as "
                    f"{written[t.name].name}: it was made by another engine or version"
                )
    named = _named(name, f"{model.id}-clone")
    return _recipe(as_source(model), written, engine, named, model.source)


def import_rules(
    file: Path, model: Model, engine: Engine = "ik", *, default: str | None = None, name: str = ""
) -> Recipe:
    """Return the recipe of a file of `regex=type` lines (comments, any order, first match wins).

    Args:
        default: type of tensors that no rule matches.

    Raises:
        BadFile: the file cannot be read.
        UsageError: a line is no rule, or tensors are matched by none and there is no default, or
            `name` cannot be a folder.
    """
    found = resolve_rules(read_rules(file).splitlines(), model, engine, source=str(file))
    bare = [t.name for t in model.tensors if t.quantizable and t.name not in found]
    if not found:
        raise UsageError(
            f"{file} holds no regex=type rule for any tensor of {model.id}: is it the right file?"
        )
    if bare and default is None:
        raise UsageError(
            f"{file}: {len(bare)} of {len(model.tensors)} tensors are matched by no rule, as "
            f"{bare[0]}: is it for another model or layout? --default TYPE types them all"
        )
    asked = {**dict.fromkeys(bare, default or ""), **found}
    written = {t.name: _written(t, asked[t.name], engine) for t in model.tensors if t.quantizable}
    stem = _stem(file)
    named = stem if stem.lower().startswith(model.id) else f"{model.id}-{stem}"
    return _recipe(model, written, engine, _named(name, named), file.name)


def read_rules(file: Path) -> str:
    """Return the text of a rules file.

    Raises:
        BadFile: missing, too large or not text.
    """
    try:
        if file.stat().st_size > _MAX_RULES_BYTES:
            raise BadFile(f"{file} is larger than {_MAX_RULES_BYTES >> 20} MiB: not a rules file")
        return file.read_text(encoding="utf-8")
    except OSError as err:
        raise BadFile(f"{file} cannot be read: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise BadFile(f"{file} is not text: {err.reason} at byte {err.start}") from err


def model_named_in(file: Path) -> str | None:
    """Return the known model that a rules file names, None when it names none.

    A `# Model name:` line counts, then the file's name up to its first dot that is not part of a
    version (`GLM-4.5-Air.me-3bpw…`), then the GGUF files of a pasted command.

    Raises:
        BadFile: the file cannot be read.
    """
    text = read_rules(file)
    found = _MODEL_LINE.search(text)
    if found:
        return found[1]
    head = re.split(r"\.(?!\d)", file.name)[0]
    sources = [_SOURCE_FORM.sub("", Path(name).name) for name in _SOURCE.findall(text)]
    return next((name for name in (head, *sources) if is_known(name)), None)


def layout_named_in(file: Path) -> str | None:
    """Return `ik` when the rules speak of attn_kv_b beside its halves, `legacy` without them.

    Raises:
        BadFile: the file cannot be read.
    """
    text = read_rules(file)
    if "attn_kv_b" not in text:
        return None
    return "ik" if "attn_k_b" in text else "legacy"


def as_source(model: Model) -> Model:
    """Return the unquantized model of a quantized file: same tensors, matrices bf16."""
    tensors = tuple(
        replace(t, source_type="bf16") if stored_type(t.source_type).is_quantized else t
        for t in model.tensors
    )
    return replace(model, tensors=tensors)


def planned(
    model: Model, written: Mapping[str, GgmlType], loss: LossModel
) -> tuple[PlannedTensor, ...]:
    """Return every tensor of the file with bytes and predicted damage; no device is assumed."""
    kinds = sorted({k.name: k for k in written.values() if k.is_quantized}.values(), key=_by_id)
    column = {k.name: i for i, k in enumerate(kinds)}
    damage = loss.damage(model, kinds) if kinds else np.zeros((len(model.tensors), 0))
    rows = []
    for i, t in enumerate(model.tensors):
        kind = written.get(t.name) or stored_type(t.source_type)
        c = column.get(kind.name) if t.quantizable else None
        rows.append(
            PlannedTensor(
                name=t.name,
                shape=t.shape,
                role=t.role,
                layer=t.layer,
                type=kind.name,
                bytes=tensor_bytes(kind, t.shape),
                device="file",
                damage=0.0 if c is None else float(damage[i, c]),
            )
        )
    return tuple(rows)


def _recipe(
    model: Model, written: Mapping[str, GgmlType], engine: Engine, name: str, origin: str
) -> Recipe:
    from quantmix.loss import load

    loss = load(model, engine=engine)
    tensors = planned(model, written, loss)
    mix = [_quantized(written.get(t.name)) for t in model.tensors]
    total = float(sum(t.damage for t in tensors))
    return assemble(
        model,
        make_settings(engine=engine),
        tensors,
        name=name,
        budget={"label": f"types of {origin}", "ideal": False},
        devices=(),
        quality=replace(loss.quality(model, mix), damage=total),
        optimality=Optimality(
            status="feasible",
            objective=total,
            lower_bound=0.0,
            gap=1.0 if total else 0.0,
            constraints=(f"types as in {origin}; nothing was searched",),
            holds_for="nothing: taken over, not searched",
        ),
        speed=Speed(),
    )


def _written(t: Tensor, asked: str, engine: Engine) -> GgmlType:
    """Return the type that the engine writes when asked, refusing what no run can write."""
    kind = get(asked, engine)
    if not kind.writable:
        raise UsageError(f"{t.name}: {engine} knows {asked} but cannot write it to a file")
    return resolve(asked, t.name, t.shape, engine)


def _spelled(stored: str, engine: Engine) -> str:
    """Return the name that `engine` has for a stored type (41 is q1_0_g128 in ik, q1_0 else)."""
    same = by_id(engine).get(stored_type(stored).id)
    return same.name if same else stored


def _quantized(kind: GgmlType | None) -> GgmlType | None:
    return kind if kind is not None and kind.is_quantized else None


def _by_id(kind: GgmlType) -> int:
    return kind.id


def _stem(file: Path) -> str:
    return re.sub(r"\.(recipe|txt|args|rules|sh)(?=\.|$)", "", file.name)


def _named(name: str, derived: str) -> str:
    """Return the name that was given, or a folder name made of what was derived."""
    if name:
        require_name(name)
        return name
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", derived).strip("-.")[:120] or "recipe"
