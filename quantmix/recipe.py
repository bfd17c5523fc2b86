"""The one document: what a design decided. Every later step reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

from quantmix.errors import BadFile
from quantmix.ggml.header import is_gguf
from quantmix.loss.quality import Quality
from quantmix.memory.settings import Settings
from quantmix.speed.prediction import Speed

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model the recipe is for."""

    id: str
    arch: str
    layout: str
    n_tensors: int
    n_elements: int
    source: str


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Which engine the rules and flags are for; `ftype` is the preset named on its command line."""

    name: str
    build: str
    ftype: str


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the file; `bpw` = 8 · tensor_bytes / n_elements."""

    tensor_bytes: int
    file_bytes: int
    file_bytes_exact: bool
    unloaded_bytes: int
    bpw: float


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What one device holds; capacity and free are None for a host without a stated RAM."""

    name: str
    kind: str
    capacity_bytes: int | None
    weights_bytes: int
    derived_bytes: int
    kv_bytes: int
    compute_bytes: int
    reserve_bytes: int
    free_bytes: int | None

    @property
    def used_bytes(self) -> int:
        """Everything the device must hold."""
        return (
            self.weights_bytes
            + self.derived_bytes
            + self.kv_bytes
            + self.compute_bytes
            + self.reserve_bytes
        )


@dataclass(frozen=True, slots=True)
class Optimality:
    """How good the answer is, proven: objective, lower bound, prices in nats per GiB.

    `gap` is that of stage 1, least damage. `given_for_speed` is what stage 2 then spent of the
    quality slack, in nats, so `objective − given_for_speed` is what the gap is about. `holds_for`
    says what the bound is about: any mix, any mix on any placement (with RAM), or any on this
    split of the layers (several GPUs without).
    """

    status: str
    objective: float
    lower_bound: float
    gap: float
    constraints: tuple[str, ...] = ()
    prices: dict[str, float] = field(default_factory=dict)
    given_for_speed: float = 0.0
    holds_for: str = "any mix"


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the planned file."""

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    type: str
    bytes: int
    device: str
    damage: float

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class Recipe:
    """A complete design; docs/interface.md, recipe.json, has the meaning of every key."""

    model: ModelInfo
    engine: EngineInfo
    settings: Settings
    size: Size
    devices: tuple[DeviceUse, ...]
    quality: Quality
    optimality: Optimality
    speed: Speed
    types: dict[str, dict[str, int]]
    rules: tuple[str, ...]
    commands: dict[str, list[str]]
    offload: dict[str, Any]
    tensors: tuple[PlannedTensor, ...]
    name: str = ""
    created: str = ""
    quantmix: str = ""
    check: dict[str, Any] | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    refined: dict[str, Any] | None = None
    """What `refine` measured, for a recipe that it made; the key is left out of others."""

    @property
    def with_imatrix(self) -> bool:
        """Whether it was designed to be quantized with an importance matrix."""
        return "--imatrix" in self.commands.get("quantize", ())

    @property
    def quantize_arguments(self) -> str:
        """What quantize.sh is called with, words that stand for files."""
        return "SOURCE.gguf OUT.gguf" + (" IMATRIX.dat" if self.with_imatrix else "")

    def to_json(self) -> dict[str, Any]:
        """Return the document as plain JSON values, the long list of tensors last."""
        doc: dict[str, Any] = {"schema": SCHEMA, "quantmix": self.quantmix, "created": self.created}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("quantmix", "created", "tensors") or (f.name, value) == ("refined", None):
                continue
            doc[f.name] = _plain(value)
        doc["tensors"] = [_plain(t) for t in self.tensors]
        return doc

    def save(self, folder: str | Path, *, figures: bool = True) -> Path:
        """Write the recipe folder (docs/interface.md), all or nothing, and return it.

        Files of others in an existing recipe folder stay; a GGUF that does not fit this recipe
        moves into `earlier-N` there, with the recipe that made it.

        Raises:
            UsageError: the folder cannot be written.
        """
        from quantmix.emit.folder import write_folder

        return write_folder(self, folder, figures=figures).folder

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Recipe:
        """Rebuild a recipe from `to_json`.

        Raises:
            BadFile: a key is missing or has the wrong form.
        """
        try:
            return cls(
                model=ModelInfo(**doc["model"]),
                engine=EngineInfo(**doc["engine"]),
                settings=_known(Settings, doc["settings"]),
                size=Size(**doc["size"]),
                devices=tuple(_known(DeviceUse, d) for d in doc["devices"]),
                quality=_known(
                    Quality, {**doc["quality"], "warnings": tuple(doc["quality"]["warnings"])}
                ),
                optimality=_known(
                    Optimality,
                    {**doc["optimality"], "constraints": tuple(doc["optimality"]["constraints"])},
                ),
                speed=_known(Speed, doc["speed"]),
                types=doc["types"],
                rules=tuple(doc["rules"]),
                commands=doc["commands"],
                offload=doc["offload"],
                tensors=tuple(
                    PlannedTensor(**{**t, "shape": tuple(t["shape"])}) for t in doc["tensors"]
                ),
                name=doc.get("name", ""),
                created=doc.get("created", ""),
                quantmix=doc.get("quantmix", ""),
                check=doc.get("check"),
                budget=doc.get("budget", {}),
                refined=doc.get("refined"),
            )
        except (KeyError, TypeError, AttributeError) as err:
            raise BadFile(f"not a quantmix recipe: {err!r} while reading it") from err


def load(path: str | Path) -> Recipe:
    """Read a recipe from its folder or its recipe.json.

    Raises:
        BadFile: nothing there, or not a recipe.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "recipe.json"
    try:
        doc = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = sorted(p.parent for p in file.parent.glob("*/recipe.json"))
        if file != Path(path) and inside:
            raise BadFile(f"{path} is a folder of recipes: name one, like {inside[0]}") from None
        raise BadFile(f"no recipe at {path}: make one with `quantmix design`") from None
    except OSError as err:
        raise BadFile(f"{file} cannot be read: {err.strerror or err}") from err
    except ValueError as err:
        made = "`quantmix clone` makes one of a GGUF" if is_gguf(file) else "name its folder"
        raise BadFile(f"{file} is no recipe of quantmix ({made})") from err
    if not isinstance(doc, dict) or doc.get("schema") != SCHEMA:
        raise BadFile(f"{file} is not a quantmix recipe of schema {SCHEMA}")
    try:
        return Recipe.from_json(doc)
    except BadFile as err:
        raise BadFile(f"{file} is {err}") from err


def _plain(value: Any) -> Any:
    """Turn dataclasses and tuples into dicts and lists, at any depth."""
    if hasattr(value, "__dataclass_fields__"):
        return {k: _plain(v) for k, v in asdict(value).items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _known(kind: Any, doc: dict[str, Any]) -> Any:
    """Build `kind` from the keys of `doc` that it has; newer documents may hold more."""
    names = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in doc.items() if k in names})
