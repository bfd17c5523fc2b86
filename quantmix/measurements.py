"""Measured sensitivities: the file that `measure` writes and `design --measurements` reads.

    {"schema": 1, "kind": "quantmix-measurements",
     "model": "<model fingerprint>", "model_name": "…", "base": "<data fingerprint of the source>",
     "engine": "ik pip 0.1.5", "corpus": "<sha256>", "imatrix": "<sha256>" or null,
     "n_ctx": 512, "chunks": 8, "tokens": 2040, "ppl_base": 31.2, "noise_floor": 1e-7,
     "around": {"tensor": "type", …} or {}, "around_kld": 0.0,
     "probes": [{"scope": "role|band|tensor", "role": "ffn_down", "layers": [0, 1] or [],
                 "type": "iq2_xs", "kld": 0.337, "kld_err": 0.008, "ln_ratio": 0.34,
                 "ln_ratio_err": 0.01, "err": 0.09, "n_elements": 35389440, "seconds": 9.1,
                 "fallbacks": 0, "tokens": 2040}],
     "failed": [{"scope": …, "role": …, "layers": …, "type": …, "why": "…"}],
     "errors": [{"tensor": "blk.0.ffn_down.weight", "type": "iq2_xs", "err": 0.09}]}

Top-level chunks, tokens, ppl_base and noise_floor are those of the latest run; a file may hold
probes of several scopes and lengths of text, `tokens` of a probe says its own.

`kld` (nats, against the unquantized model) is measured with everything else at `around`: the
tensors of `role` in `layers` (empty: all layers, or a role without layers) at `type`. `err` is the
imatrix-weighted relative squared error of the same tensors, Σ w·(x−x̂)² / Σ w·x². `errors` need no
model run: they rank tensors and scale a measured role to its tensors, but are no KLD themselves.

A table of another tool (`quantmix import`) says neither errors nor the base's perplexity nor whose
weights it is of: `err` and `ppl_base` are 0 there, and `model` is `table:` and a digest of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from quantmix.errors import BadFile
from quantmix.files import write_text

SCHEMA: Final = 1
KIND: Final = "quantmix-measurements"
TABLE: Final = "table:"

Scope = Literal["role", "band", "tensor"]
Key = tuple[str, str, tuple[int, ...], str]


@dataclass(frozen=True, slots=True)
class Probe:
    """One measured change; see the module's text for every field."""

    scope: Scope
    role: str
    layers: tuple[int, ...]
    type: str
    kld: float
    kld_err: float
    ln_ratio: float
    ln_ratio_err: float
    err: float
    n_elements: int
    seconds: float
    fallbacks: int = 0
    tokens: int = 0

    @property
    def key(self) -> Key:
        """What was changed: scope, role, layers, type."""
        return (self.scope, self.role, self.layers, self.type)


@dataclass(frozen=True, slots=True)
class Failed:
    """A probe that the engine could not do, and why."""

    scope: Scope
    role: str
    layers: tuple[int, ...]
    type: str
    why: str

    @property
    def key(self) -> Key:
        """What was tried."""
        return (self.scope, self.role, self.layers, self.type)


@dataclass(frozen=True, slots=True)
class TensorError:
    """Imatrix-weighted relative error of one tensor in one type; no model run."""

    tensor: str
    type: str
    err: float


@dataclass(frozen=True)
class Measurements:
    """A results file."""

    model: str
    model_name: str
    base: str
    engine: str
    corpus: str
    imatrix: str | None
    n_ctx: int
    chunks: int
    tokens: int
    ppl_base: float
    noise_floor: float
    around: Mapping[str, str] = field(default_factory=dict)
    around_kld: float = 0.0
    probes: tuple[Probe, ...] = ()
    failed: tuple[Failed, ...] = ()
    errors: tuple[TensorError, ...] = ()

    @property
    def is_table(self) -> bool:
        """Whether it is a table of another tool, which has no fingerprint of its model."""
        return self.model.startswith(TABLE)

    @property
    def done(self) -> set[Key]:
        """Keys that need no further run."""
        return {p.key for p in self.probes} | {f.key for f in self.failed}

    def same_conditions(self, other: Measurements) -> list[str]:
        """Return the names of the conditions in which two files differ; empty when comparable."""
        names = ("model", "base", "engine", "corpus", "imatrix", "n_ctx", "around")
        return [n for n in names if getattr(self, n) != getattr(other, n)]

    def with_probe(self, probe: Probe) -> Measurements:
        """Return a copy with one more probe."""
        return replace(self, probes=(*self.probes, probe))

    def with_failed(self, failed: Failed) -> Measurements:
        """Return a copy with one more failure."""
        return replace(self, failed=(*self.failed, failed))


def load(path: str | Path) -> Measurements:
    """Read a results file.

    Raises:
        BadFile: missing, not such a file, or a field of it is of the wrong kind or not finite.
    """
    file = Path(path)
    try:
        doc = json.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise BadFile(f"{file} cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise BadFile(f"{file} is not JSON: {err}") from err
    if not isinstance(doc, dict) or doc.get("kind") != KIND or doc.get("schema") != SCHEMA:
        raise BadFile(
            f"{file} is no measurements file of schema {SCHEMA}: make one with `quantmix measure`"
        )
    try:
        made = Measurements(
            **{f.name: doc[f.name] for f in fields(Measurements) if f.name not in _LISTS},
            probes=tuple(Probe(**{**p, "layers": tuple(p["layers"])}) for p in doc["probes"]),
            failed=tuple(Failed(**{**p, "layers": tuple(p["layers"])}) for p in doc["failed"]),
            errors=tuple(TensorError(**e) for e in doc["errors"]),
        )
        for part in (made, *made.probes, *made.failed, *made.errors):
            _require_kinds(file, part)
    except (KeyError, TypeError, OverflowError) as err:
        raise BadFile(f"{file} is damaged: {err!r}") from err
    return made


_LISTS: Final = ("probes", "failed", "errors")


def _require_kinds(file: Path, part: Any) -> None:
    """Raise BadFile where a field of a dataclass that `file` was read into is not of its kind."""
    for f in fields(part):
        value = getattr(part, f.name)
        if f.name not in _LISTS and not _is_a(value, str(f.type)):
            raise BadFile(
                f"{file} is damaged: {f.name} is {value!r} where {f.type} belongs; "
                "measure again with another --out"
            )


def _is_a(value: Any, kind: str) -> bool:
    """Whether a value of JSON is of the kind that a field's annotation says, numbers finite."""
    if kind == "int":
        return isinstance(value, int)
    if kind == "float":
        return isinstance(value, int | float) and math.isfinite(value)
    if kind == "Scope":
        return value in get_args(Scope)
    if kind == "tuple[int, ...]":
        return all(isinstance(x, int) for x in value)
    if kind == "Mapping[str, str]":
        return isinstance(value, dict) and all(isinstance(x, str) for x in value.values())
    return isinstance(value, str) or (value is None and kind.endswith("None"))


def save(measurements: Measurements, path: str | Path) -> None:
    """Write a results file; the old one stays until the new one is complete."""
    doc: dict[str, Any] = {"schema": SCHEMA, "kind": KIND, **asdict(measurements)}
    write_text(path, json.dumps(doc, indent=1, allow_nan=False) + "\n")
