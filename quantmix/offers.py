"""Files that one could take: GGUFs in a folder or repository, or the mixes that were published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from quantmix.engine import presets
from quantmix.errors import BadFile, EngineError, EngineMissing, QuantmixError, UsageError
from quantmix.ggml import types
from quantmix.ggml.shards import numbers_of, prefix_of
from quantmix.ggml.types import Engine
from quantmix.loss import evidence, mixes, prior
from quantmix.loss.evidence import Published
from quantmix.models.model import Model
from quantmix.models.several import gguf_specs
from quantmix.models.sources import is_file_spec, load_model

STOCK: Final = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XXS"),
    *("IQ1_M", "IQ1_S"),
)
"""Presets that most models are published at."""

_AT_ONCE: Final = 8  # headers read at a time over the network


@dataclass(frozen=True)
class Offer:
    """A file that could be taken.

    Attributes:
        name: short, for tables.
        source: a file, `hf:…` or URL; of a mix that is known without a file, where it is told of.
        model: the types of the file are the source types of its tensors.
        published: what its publisher measured.
        is_file: whether `source` is one.
    """

    name: str
    source: str
    model: Model
    published: Published | None = None
    is_file: bool = True

    @property
    def file(self) -> str:
        """The first file as it is called once it is here; `MODEL` where that is not known."""
        if not self.is_file:
            return "MODEL"
        if not self.source.startswith("hf:"):
            return _file_name(self.source) if "://" in self.source else self.source
        return "/".join(self.source.split("/")[2:])

    @property
    def fetch(self) -> list[str]:
        """The command that fetches a file of the hub with all its shards; empty for others."""
        if not self.source.startswith("hf:"):
            return []
        org, repo, *path = self.source.removeprefix("hf:").split("/")
        shard = numbers_of(path[-1])
        name = f"{shard[0]}-*.gguf" if shard else path[-1]
        wanted = "/".join([*path[:-1], name])
        return ["hf", "download", f"{org}/{repo}", "--include", wanted, "--local-dir", "."]


@dataclass(frozen=True)
class Offers:
    """All there is to choose from, of one model; `left_out` are names with the reason."""

    files: tuple[Offer, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def model(self) -> Model:
        """The model of the first file."""
        return self.files[0].model


def offers(
    specs: Sequence[str],
    on_event: Callable[[dict[str, Any]], None] | None = None,
    *,
    stock: Sequence[str] = (),
    engine: Engine = "ik",
) -> Offers:
    """Return the files behind `specs`; in a folder, files of another model than most are left out.

    Args:
        specs: what `gguf_specs` takes, or a name of the catalog for its published mixes.
        on_event: progress, `{"file": i, "of": n}`.
        stock: presets of llama-quantize to offer too, of names of the catalog, as `engine` makes
            them.

    Raises:
        EngineMissing: presets, and no engine that tells what they are.
        UnknownName, BadFile: nobody knows a name, nothing can be read.
        UsageError: files that were named one by one are of different models.
    """
    found: list[Offer] = []
    named: list[Offer] = []
    left_out: list[tuple[str, str]] = []
    for spec in specs:
        more = _of_files(spec, on_event) if is_file_spec(spec) else _of_catalog(spec, stock, engine)
        found += more.files
        named += more.files if len(more.files) + len(more.left_out) == 1 else ()
        left_out += more.left_out
    if not found:
        name, why = left_out[0]
        raise BadFile(f"nothing to choose from: {name}: {why}")
    shapes = Counter(_shape(o.model) for o in named or found)
    wanted = shapes.most_common(1)[0][0]
    same = [o for o in found if _shape(o.model) == wanted]
    for other in found:
        if _shape(other.model) == wanted:
            continue
        if other in named:
            raise UsageError(
                f"{other.name} is {other.model.id}, {same[0].name} is {same[0].model.id}: choose "
                "among files of one model"
            )
        left_out.append((other.name, f"it is another model, {other.model.id}"))
    return Offers(_named_apart(same), tuple(left_out))


def _of_catalog(name: str, stock: Sequence[str], engine: Engine) -> Offers:
    """Return the published mixes of a model of the catalog whose types are known, and presets.

    Raises:
        EngineMissing: presets, and no engine that tells what they are.
    """
    model = load_model(name)
    rows = evidence.of_model(model)
    share = prior.shares(model)
    found, left_out = [], []
    for row in rows:
        try:
            chances = mixes.resolve(model, row.mix, share)
        except UsageError:
            part = "not enough of its types is" if row.mix else "its types are not"
            left_out.append((row.label, f"{part} published"))
            continue
        mix = _typed(model, chances)
        found.append(Offer(row.label, row.source, mix, row, is_file=False))
    for preset in stock:
        label = f"{preset} (stock)"
        try:
            mix = presets.made(model, preset, engine)
        except EngineMissing:
            raise
        except EngineError:
            why = f"the {engine} engine here does not make it of {model.arch}: try another --engine"
            left_out.append((label, why))
            continue
        found.append(Offer(label, "a preset of llama-quantize", mix, is_file=False))
    if not found and not stock:
        mend = "add --presets, or name GGUF files"
        left_out.insert(0, (model.id, f"no mix of it is known with its types: {mend}"))
    return Offers(tuple(found), tuple(left_out))


def _typed(model: Model, chances: Sequence[Mapping[str, float] | None]) -> Model:
    """Return the model with one type per tensor.

    Where a mix tells a share of each type only, types take turns in every role, as often as told.
    Nobody tells the types of multi-token blocks: they are those of the last layer, and what only
    they have is like the head, which agrees with the sizes that are published.
    """
    owed: dict[str, dict[str, float]] = {}
    tensors = []
    for tensor, chance in zip(model.tensors, chances, strict=True):
        if chance is None:
            tensors.append(tensor)
            continue
        debt = owed.setdefault(tensor.role, {})
        for kind, share in chance.items():
            debt[kind] = debt.get(kind, 0.0) + share
        chosen = max(chance, key=lambda kind: debt[kind])
        debt[chosen] -= 1.0
        engine: Engine = "ik" if chosen in types.table("ik") else "mainline"
        written = types.resolve(chosen, tensor.name, tensor.shape, engine)
        tensors.append(replace(tensor, source_type=written.name))
    last = {t.role: t.source_type for t in tensors if t.quantizable and t.loaded}
    head = last.get("output", last["token_embd"])
    return replace(
        model,
        tensors=tuple(
            t if t.loaded or not t.quantizable else replace(t, source_type=last.get(t.role, head))
            for t in tensors
        ),
    )


def _of_files(spec: str, on_event: Callable[[dict[str, Any]], None] | None) -> Offers:
    """Read the headers of the GGUF models behind `spec`; those that cannot be read are left out."""
    files = gguf_specs(spec)
    found: list[Offer] = []
    left_out: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for i, (file, read) in enumerate(
            [(file, pool.submit(partial(load_model, file))) for file in files], 1
        ):
            name = prefix_of(_file_name(file) if "://" in file else file.rpartition("/")[2])
            try:
                found.append(Offer(name, file, read.result()))
            except QuantmixError as err:
                if len(files) == 1:
                    raise
                left_out.append((name, str(err)))
            if on_event:
                on_event({"file": i, "of": len(files)})
    return Offers(tuple(found), tuple(left_out))


def _file_name(url: str) -> str:
    """Return the name that a URL's file is saved under, without what is asked of the server."""
    return unquote(urlsplit(url).path).rpartition("/")[2]


def _shape(model: Model) -> tuple[object, ...]:
    """Return what files of one model have in common, however they were converted."""
    h = model.hparams
    return model.arch, h.n_layer, h.n_embd, h.n_vocab, h.n_expert


def _named_apart(found: Sequence[Offer]) -> tuple[Offer, ...]:
    """Put the folder before names that occur twice."""
    names = [o.name for o in found]
    return tuple(
        replace(o, name=f"{o.source.rpartition('/')[0].rpartition('/')[2]}/{o.name}")
        if names.count(o.name) > 1 and o.is_file
        else o
        for o in found
    )
