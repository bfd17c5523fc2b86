"""Write a recipe folder: all of it or nothing, and nothing of anybody else's is lost."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quantmix.emit import scripts
from quantmix.emit.readme import readme
from quantmix.errors import BadFile, UsageError
from quantmix.ggml.shards import read_set, shard_paths

if TYPE_CHECKING:
    from quantmix.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Written:
    """A written recipe folder; `notes` tell what of an earlier recipe was set aside there."""

    folder: Path
    notes: tuple[str, ...] = ()


def write_folder(recipe: Recipe, folder: str | Path, *, figures: bool = True) -> Written:
    """Write every file of a recipe (docs/interface.md, recipe folder).

    The files are written beside their place and moved there when complete. Of a recipe that is
    there already, the files that this function writes are replaced; all others stay. A GGUF made
    by the earlier recipe that does not fit the new one is moved into `earlier-N` in the folder,
    together with the earlier recipe: `verify` and `quantize` find it there.

    Raises:
        UsageError: the folder cannot be written, or holds no recipe but something else.
    """
    target = Path(folder)
    try:
        place = target.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        require_place(target)
        fresh = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as err:
        raise UsageError(f"cannot write to {target}: {err.strerror}") from err
    try:
        _write_texts(recipe, fresh)
        if figures:
            _write_figures(recipe, fresh)
        fresh.chmod(0o755)
        outdated = outdated_files(recipe, place)
        old = _swap(fresh, place)
    except OSError as err:
        raise UsageError(f"cannot write {target}: {err.strerror}") from err
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    try:
        kept = _bring_back(old, place, outdated) if old else None
    except OSError as err:
        raise UsageError(
            f"{target} is written, but files of the earlier folder are still in {old}: "
            f"{err.filename}: {err.strerror}"
        ) from err
    return Written(target, (kept_note(target / kept.name, outdated),) if kept else ())


def require_place(folder: Path) -> None:
    """Refuse a folder that `write_folder` would refuse.

    Raises:
        UsageError: it holds no recipe but something else, or is a file.
    """
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as err:
        raise UsageError(f"cannot write to {folder}: {err.strerror}") from err
    if taken and not (folder / "recipe.json").exists():
        raise UsageError(f"{folder} exists and is no recipe folder: choose another --out")


def _document(recipe: Recipe) -> str:
    return json.dumps(recipe.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


_TEXTS: Final[Mapping[str, Callable[[Recipe], str]]] = {
    "recipe.json": _document,
    "rules.txt": scripts.rules_text,
    "rules.args": scripts.rules_args,
    "quantize.sh": scripts.quantize_sh,
    "README.md": readme,
    "serve.sh": scripts.serve_sh,
    "verify.sh": scripts.verify_sh,
}
_MEMORY: Final = "memory.png"
_TYPES: Final = "types.png"
OURS: Final = frozenset({*_TEXTS, _MEMORY, _TYPES})
"""What `write_folder` writes, and therefore replaces."""

_OF_DEVICES: Final = frozenset({"serve.sh", _MEMORY})  # only where the budget names devices
_OF_WEIGHTS: Final = frozenset({"verify.json", "report.html"})
"""What other commands write about the quantized file: it stays with that file."""


def _write_texts(recipe: Recipe, folder: Path) -> None:
    for name, text in _TEXTS.items():
        if name in _OF_DEVICES and not recipe.devices:
            continue
        path = folder / name
        # A name that is no UTF-8 is escaped, which JSON reads back.
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text(recipe))
            file.flush()
            os.fsync(file.fileno())
        if name.endswith(".sh"):
            path.chmod(0o755)


def _write_figures(recipe: Recipe, folder: Path) -> None:
    from quantmix.emit import figures

    if recipe.devices:
        figures.save(figures.memory_figure(recipe), folder / _MEMORY)
    figures.save(figures.types_figure(recipe), folder / _TYPES)


def outdated_files(recipe: Recipe, place: Path) -> frozenset[str]:
    """Return the GGUF files that the recipe now in `place` promises and `recipe` does not."""
    from quantmix.recipe import load

    try:
        wanted, before = _mix(recipe), _mix(load(place))
    except BadFile:
        return frozenset()
    found: set[str] = set()
    for file in sorted(place.glob("*.gguf")) if wanted != before else ():
        if file.name in found:
            continue
        try:
            mix = {t.name: (t.type.name, t.n_bytes) for t in read_set(file).tensors}
        except BadFile:
            continue
        if mix == before:
            found |= {p.name for p in shard_paths(file)}
    return frozenset(found)


def _mix(recipe: Recipe) -> dict[str, tuple[str, int]]:
    return {t.name: (t.type, t.bytes) for t in recipe.tensors}


def _swap(fresh: Path, place: Path) -> Path | None:
    """Put `fresh` into its place; return where the folder that was there lies now.

    A reader sees the old or the new one. When the new one cannot be moved, the old one is back.
    """
    if not place.exists():
        fresh.rename(place)
        return None
    holder = Path(tempfile.mkdtemp(prefix=f".{place.name}-old-", dir=place.parent))
    old = holder / "recipe"
    try:
        place.rename(old)
    except OSError:
        holder.rmdir()
        raise
    try:
        fresh.rename(place)
    except OSError as err:
        try:
            old.rename(place)
        except OSError:
            raise UsageError(
                f"cannot write {place}: {err.strerror}; the earlier folder is now {old}"
            ) from err
        holder.rmdir()
        raise
    return old


def _bring_back(old: Path, place: Path, outdated: Set[str]) -> Path | None:
    """Move from `old` to `place` what is not ours; return the folder of an outdated GGUF.

    What is ours is removed, or goes with that GGUF.
    """
    stay = OURS | outdated | (_OF_WEIGHTS if outdated else frozenset())
    for entry in sorted(old.iterdir()):
        if entry.name not in stay:
            entry.rename(place / entry.name)
    kept = None
    if outdated:
        kept = next_earlier(place)
        old.rename(kept)
    else:
        for name in OURS:
            (old / name).unlink(missing_ok=True)
        old.rmdir()
    old.parent.rmdir()
    return kept


def next_earlier(place: Path) -> Path:
    """Return the first `earlier-N` that is not there yet."""
    n = 1
    while (place / f"earlier-{n}").exists():
        n += 1
    return place / f"earlier-{n}"


def kept_note(kept: Path, outdated: Set[str]) -> str:
    """Return the line that tells where files of an earlier recipe are kept, and why."""
    names = sorted(outdated)
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (
        f"{kept} keeps the earlier recipe and the file it made, which does not fit "
        f"the new one: {some}"
    )
