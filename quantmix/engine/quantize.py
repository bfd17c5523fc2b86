"""Make the file that a recipe promises, and prove that it is the one.

Preflight finds what would otherwise fail hours in; llama-quantize then writes to a hidden file,
which is compared with the recipe tensor by tensor and only then gets its name.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantmix.engine import binaries
from quantmix.engine.find import Program
from quantmix.engine.ghost import model_engine
from quantmix.engine.mainline_find import find_mainline
from quantmix.engine.shards import require_fitting_shards, split
from quantmix.errors import BadFile, CheckFailed, EngineMissing, SourceMismatch, UsageError
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml import types
from quantmix.ggml.header import is_gguf
from quantmix.ggml.shards import prefix_of
from quantmix.ggml.types import Engine
from quantmix.ggml.weights import WeightsFile, open_weights
from quantmix.recipe import Recipe
from quantmix.units import gib

_PROGRESS: Final = re.compile(r"^\[ *(\d+)/ *(\d+)\] +(\S+)")
_MLA_PART: Final = re.compile(r"\.attn_(k|v|kv)_b\.")
_SPARE_BYTES: Final = 64 << 20  # header, padding and file system overhead
# Linux limits one argument to 128 KiB (MAX_ARG_STRLEN); ik takes the flag repeatedly.
_ARGUMENT_BYTES: Final = 96 << 10


@dataclass(frozen=True, slots=True)
class Quantized:
    """A written and verified file."""

    path: Path
    files: tuple[Path, ...]
    n_tensors: int
    tensor_bytes: int
    file_bytes: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A preflighted run: everything checked, nothing written."""

    recipe: Recipe
    source: WeightsFile
    out: Path
    binary: binaries.Binary
    imatrix: imatrices.Imatrix | None
    imatrix_path: Path | None
    allow_requantize: bool
    split_max_bytes: int | None
    warnings: tuple[str, ...]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(t.bytes for t in self.recipe.tensors)


def quantize(
    plan: Plan,
    *,
    threads: int | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Quantized:
    """Run llama-quantize by a plan and verify the result.

    Args:
        on_event: progress, `{"tensor": i, "of": n, "name": "…"}`.

    Raises:
        EngineError: llama-quantize failed; its last lines are in the message.
        CheckFailed: the file is not what the recipe says. Nothing is left behind either way.
    """
    started = time.perf_counter()
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plan.out.parent, prefix=".quantmix-") as scratch:
        made = Path(scratch) / plan.out.name
        with _imatrix_file(plan, Path(scratch)) as imatrix:
            command = command_line(plan, made, imatrix, threads, Path(scratch))
            status, lines = binaries.run(command, _watch(on_event))
        if status or not made.exists():
            raise binaries.failure(command, status, lines)
        compare(plan.recipe, open_weights(made))
        parts = [made]
        if plan.split_max_bytes:
            parts = split(open_weights(made), plan.split_max_bytes, Path(scratch) / "shards")
            compare(plan.recipe, open_weights(parts[0]))
        final = [plan.out.with_name(p.name) for p in parts]
        for part, target in zip(parts, final, strict=True):
            os.replace(part, target)
    return Quantized(
        path=final[0],
        files=tuple(final),
        n_tensors=len(plan.recipe.tensors),
        tensor_bytes=plan.tensor_bytes,
        file_bytes=sum(p.stat().st_size for p in final),
        seconds=time.perf_counter() - started,
        warnings=plan.warnings,
    )


def preflight(
    recipe: Recipe,
    source: str | Path,
    out: str | Path,
    *,
    imatrix: str | Path | None = None,
    allow_requantize: bool = False,
    split_max_bytes: int | None = None,
    llama_bin: str | Path | None = None,
) -> Plan:
    """Check everything a run needs before it starts.

    Args:
        split_max_bytes: cut the result into shards of at most so many bytes.

    Raises:
        SourceMismatch: the source's tensors are not the recipe's; names the `--layout` to use.
        BadFile: the source or imatrix is malformed, or the imatrix does not serve this recipe.
        UsageError: a quantized source, a full disk, an out file that is a shard of the source or
            named like one.
        EngineMissing: no llama-quantize of the recipe's engine.
    """
    weights = open_weights(source)
    require_same_tensors(recipe, weights)
    if not allow_requantize:
        _require_float_source(recipe, weights)
    matrix = imatrices.read(imatrix) if imatrix else None
    warnings = _check_imatrix(recipe, matrix) + _misses_grid(recipe, weights, matrix)
    target = Path(out)
    _require_other_file(target, weights, is_cut=bool(split_max_bytes))
    total = sum(t.bytes for t in recipe.tensors)
    if split_max_bytes:
        require_fitting_shards({t.name: t.bytes for t in recipe.tensors}, split_max_bytes)
        total *= 2
    _require_disk(target, total)
    return Plan(
        recipe=recipe,
        source=weights,
        out=target,
        binary=_program(model_engine(recipe), llama_bin),
        imatrix=matrix,
        imatrix_path=Path(imatrix) if imatrix else None,
        allow_requantize=allow_requantize,
        split_max_bytes=split_max_bytes,
        warnings=tuple(warnings),
    )


def require_same_tensors(recipe: Recipe, weights: WeightsFile) -> None:
    """Raise SourceMismatch unless the source has exactly the recipe's tensors and shapes."""
    planned = {t.name: types.drop_ones(t.shape) for t in recipe.tensors}
    have = {name: types.drop_ones(info.shape) for name, (info, _, _) in weights.tensors.items()}
    if planned == have:
        return
    missing, extra = sorted(set(planned) - set(have)), sorted(set(have) - set(planned))
    wanted, found = _layout_of(planned), _layout_of(have)
    if wanted != found and wanted and found and _but_mla(planned) == _but_mla(have):
        raise SourceMismatch(
            f"the recipe is for the {wanted} MLA layout, {weights.path.name} has the "
            f"{found} one: design again with --layout {found}, or from the file itself"
        )
    if missing or extra:
        sample = ", ".join((missing or extra)[:3])
        what = f"lacks {len(missing)} and adds {len(extra)} tensors ({sample}, …)"
    else:
        name = next(n for n in planned if planned[n] != have[n])
        what = f"has {name} as {list(have[name])}, the recipe as {list(planned[name])}"
    raise SourceMismatch(
        f"{weights.path.name} is not the model of this recipe ({recipe.model.id}): it {what}; "
        "design from the file itself"
    )


def _layout_of(names: dict[str, tuple[int, ...]]) -> str:
    """Return the MLA layout by which attn_*_b tensors there are; empty without MLA."""
    merged = any(".attn_kv_b." in n for n in names)
    parts = any(".attn_k_b." in n for n in names)
    if merged and parts:
        return "ik"
    return "legacy" if merged else "split" if parts else ""


def _but_mla(names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that all MLA layouts of a model share."""
    return {n: shape for n, shape in names.items() if not _MLA_PART.search(n)}


def _require_float_source(recipe: Recipe, weights: WeightsFile) -> None:
    kinds = {name: info.type for name, (info, _, _) in weights.tensors.items()}
    again = [
        t.name
        for t in recipe.tensors
        if kinds[t.name].name != t.type and kinds[t.name].is_quantized
    ]
    if again:
        raise UsageError(
            f"{weights.path.name} is already quantized ({again[0]} is {kinds[again[0]].name}) and "
            f"quantizing again loses more: use the bf16 or f16 source, or --allow-requantize "
            f"({model_engine(recipe)} would refuse too)"
        )


def _check_imatrix(recipe: Recipe, matrix: imatrices.Imatrix | None) -> list[str]:
    """Return warnings; raise BadFile or UsageError for what would make the run fail."""
    engine = model_engine(recipe)
    planned = [(t.name, t.shape, types.get(t.type, engine)) for t in recipe.tensors]
    if matrix is None:
        problems = imatrices.problems(imatrices.Imatrix({}), planned, engine)
        if problems:
            raise UsageError(
                f"this recipe needs an imatrix ({problems[0]}; {len(problems)} such tensors): "
                "make one with `quantmix imatrix SOURCE --corpus TEXT` and give --imatrix"
            )
        low = any(kind.is_quantized and kind.bpw < 8 for _, _, kind in planned)
        if not (low and recipe.with_imatrix):
            return []
        return [
            "no --imatrix: the recipe was designed for one, and without it the file will be worse "
            "than predicted; `quantmix imatrix SOURCE` makes one"
        ]
    named = {name for name, _, kind in planned if kind.is_quantized}
    known = {name for name in named if imatrices.lookup(matrix, name, engine)}
    if named and len(known) * 2 < len(named):
        raise BadFile(
            f"{matrix.source} has entries for {len(known)} of {len(named)} tensors: it belongs to "
            "another model"
        )
    problems = imatrices.problems(matrix, planned, engine)
    if problems:
        raise BadFile(
            f"{matrix.source} does not serve this recipe: {problems[0]}, and "
            f"{len(problems) - 1} more; make one with `quantmix imatrix`"
        )
    heads = [n for n in ("output.weight", "token_embd.weight") if n in named][:1]
    return [
        f"{matrix.source} has no entry for {name}, which costs quality at low bits: "
        "`quantmix imatrix` writes one"
        for name in heads
        if name not in known
    ]


def _misses_grid(
    recipe: Recipe, weights: WeightsFile, matrix: imatrices.Imatrix | None
) -> list[str]:
    """Warn of weights that the recipe takes to be held as trained, where no imatrix finds them."""
    from quantmix.models.sources import load_model

    engine = model_engine(recipe)
    exact = {
        t.name: t.exact_type
        for t in load_model(str(weights.path)).tensors
        if t.exact_type not in ("", t.source_type)
    }
    missed = [
        t.name
        for t in recipe.tensors
        if exact.get(t.name) == t.type
        and (matrix is None or imatrices.lookup(matrix, t.name, engine) is None)
    ]
    if not missed:
        return []
    return [
        f"{missed[0]} and {len(missed) - 1} more were trained in 4 bits: only with an imatrix "
        f"entry does {exact[missed[0]]} hold them as they are; give --imatrix"
    ]


def _require_other_file(out: Path, weights: WeightsFile, *, is_cut: bool) -> None:
    """Raise UsageError when the run would replace a file of the source, or name its own wrongly."""
    files = [path for path, _ in weights.shards]
    if out.exists() and any(out.samefile(f) for f in files):
        raise UsageError(f"{out} is the source itself: choose another --out")
    if prefix_of(out.name) != out.name.removesuffix(".gguf"):
        raise UsageError(
            f"{out} is the name of one shard: give --out without the numbers, and --split-max-size "
            "for shards"
        )
    place = out.parent.resolve()
    if is_cut and any(f.parent.resolve() == place and prefix_of(f.name) == out.stem for f in files):
        raise UsageError(
            f"the shards of {out} would lie beside shards of the source with the same name: "
            "choose another --out"
        )


def _require_disk(out: Path, need: int) -> None:
    place = out.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need + _SPARE_BYTES:
        raise UsageError(
            f"{place} has {gib(free)} free, the file needs {gib(need + _SPARE_BYTES)}: "
            "free some or choose another --out"
        )


def _program(engine: Engine, llama_bin: str | Path | None) -> binaries.Binary:
    """Find the engine's llama-quantize; mainline's library does as well when no other is there."""
    try:
        return binaries.probe("llama-quantize", llama_bin, engine=engine)
    except EngineMissing:
        if engine != "mainline" or llama_bin:
            raise
        return _library_program()


def _library_program() -> binaries.Binary:
    """Return the program that calls mainline's library in place of its llama-quantize.

    Raises:
        EngineMissing: there is none either; the message says what to install.
    """
    found = find_mainline("quantize", libraries_only=True)
    program = Program(Path(sys.executable), "libllama", ("-m", "quantmix.engine.mainline_quantize"))
    return binaries.Binary(program, "mainline", found.version, frozenset())


@contextmanager
def _imatrix_file(plan: Plan, scratch: Path) -> Iterator[Path | None]:
    """Yield an imatrix file that the engine reads: ik wants the legacy format."""
    if plan.imatrix is None or plan.imatrix_path is None:
        yield None
    elif plan.binary.engine == "ik" and is_gguf(plan.imatrix_path):
        converted = scratch / "imatrix.dat"
        imatrices.write_dat(plan.imatrix, converted)
        yield converted
    else:
        yield plan.imatrix_path


def command_line(
    plan: Plan, out: Path, imatrix: Path | None, threads: int | None, scratch: Path
) -> list[str]:
    """Return the command; mainline's rules go into a file in `scratch`."""
    command = [str(plan.binary.program.path), *plan.binary.program.prefix]
    command += ["--allow-requantize"] if plan.allow_requantize else []
    command += ["--imatrix", str(imatrix)] if imatrix else []
    if plan.binary.engine == "ik":
        for group in _grouped(plan.recipe.rules):
            command += ["--custom-q", ",".join(group)]
    else:
        rules = scratch / "rules.args"
        rules.write_text("\n".join(plan.recipe.rules) + "\n", encoding="utf-8")
        command += ["--tensor-type-file", str(rules)]
    command += [str(plan.source.path), str(out), plan.recipe.engine.ftype]
    return command + ([str(threads)] if threads else [])


def _grouped(rules: Sequence[str]) -> Iterator[list[str]]:
    """Cut rules, in order, into arguments below the system's limit."""
    group: list[str] = []
    size = 0
    for rule in rules:
        if group and size + len(rule) + 1 > _ARGUMENT_BYTES:
            yield group
            group, size = [], 0
        group.append(rule)
        size += len(rule) + 1
    if group:
        yield group


def _watch(on_event: Callable[[dict[str, Any]], None] | None) -> Callable[[str], None]:
    def watch(line: str) -> None:
        match = _PROGRESS.match(line)
        if match and on_event:
            on_event({"tensor": int(match[1]), "of": int(match[2]), "name": match[3]})

    return watch


def compare(recipe: Recipe, weights: WeightsFile) -> None:
    """Compare a file with the recipe, tensor by tensor: names, types, bytes.

    Raises:
        CheckFailed: any difference; the first ones are named.
    """
    wrong = []
    for planned in recipe.tensors:
        found = weights.tensors.get(planned.name)
        if found is None:
            wrong.append(f"{planned.name} is missing")
        elif found[0].type.name != planned.type:
            wrong.append(f"{planned.name} is {found[0].type.name}, not {planned.type}")
        elif found[0].n_bytes != planned.bytes:
            wrong.append(f"{planned.name} has {found[0].n_bytes} bytes, not {planned.bytes}")
    extra = set(weights.tensors) - {t.name for t in recipe.tensors}
    wrong += [f"{name} is not in the recipe" for name in sorted(extra)]
    if wrong:
        raise CheckFailed(
            f"{weights.path.name} differs from the recipe in {len(wrong)} of "
            f"{len(recipe.tensors)} tensors: {'; '.join(wrong[:3])}"
        )
