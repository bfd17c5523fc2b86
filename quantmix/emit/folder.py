"""Write a recipe folder: all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quantmix.emit import scripts
from quantmix.emit.readme import readme
from quantmix.errors import UsageError

if TYPE_CHECKING:
    from quantmix.recipe import Recipe


def write_folder(recipe: Recipe, folder: str | Path, *, figures: bool = True) -> Path:
    """Write every file of a recipe (CONTRACT §2) and return the folder.

    The files are written beside their place and moved there when complete; a recipe that is
    there already is replaced.

    Raises:
        UsageError: the folder cannot be written.
    """
    target = Path(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not (target / "recipe.json").exists() and any(target.iterdir()):
            raise UsageError(f"{target} exists and is no recipe folder: choose another --out")
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as err:
        raise UsageError(f"cannot write to {target}: {err.strerror}") from err
    try:
        _write_texts(recipe, fresh)
        if figures:
            _write_figures(recipe, fresh)
        fresh.chmod(0o755)
        _swap(fresh, target)
    except OSError as err:
        raise UsageError(f"cannot write {target}: {err.strerror}") from err
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _write_texts(recipe: Recipe, folder: Path) -> None:
    document = json.dumps(recipe.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    texts: dict[str, str | Callable[[Recipe], str]] = {
        "recipe.json": document + "\n",
        "rules.txt": scripts.rules_text,
        "rules.args": scripts.rules_args,
        "quantize.sh": scripts.quantize_sh,
        "README.md": readme,
    }
    if recipe.devices:
        texts["serve.sh"] = scripts.serve_sh
    texts["verify.sh"] = scripts.verify_sh
    for name, text in texts.items():
        path = folder / name
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text if isinstance(text, str) else text(recipe))
            file.flush()
            os.fsync(file.fileno())
        if name.endswith(".sh"):
            path.chmod(0o755)


def _write_figures(recipe: Recipe, folder: Path) -> None:
    from quantmix.report import figures

    if recipe.devices:
        figures.save(figures.memory_figure(recipe), folder / "memory.png")
    figures.save(figures.types_figure(recipe), folder / "types.png")


def _swap(fresh: Path, target: Path) -> None:
    """Put `fresh` in the place of `target`; a reader sees the old or the new one."""
    if not target.exists():
        fresh.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    target.rename(old / "recipe")
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
