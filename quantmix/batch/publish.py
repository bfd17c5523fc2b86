"""Give finished outputs their names: complete before they are seen, movable again after a kill."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from quantmix.batch.state import FOLDER, Intent, State
from quantmix.errors import UsageError

STAGE = f"{FOLDER}/stage"
_TRASH = f"{FOLDER}/trash"


def publish(state: State, intent: Intent) -> None:
    """Move the outputs of a committed intent to their names and record the step as done.

    Every move is a rename inside one file system; one that happened before a kill is skipped, so
    that doing it all again ends the same.

    Raises:
        UsageError: a name is taken by something else, or cannot be written.
    """
    out = state.out
    try:
        for source, target in intent.moves:
            if (out / source).exists():
                _move(out, out / source, out / target)
        for path, digest in intent.outputs.items():
            state.remember_digest(out / path, digest)
    except OSError as err:
        name = err.filename2 or err.filename or out
        raise UsageError(f"cannot write {name}: {err.strerror}") from err
    state.done(intent)
    for source, _ in intent.moves:
        shutil.rmtree(out / STAGE / Path(source).relative_to(STAGE).parts[0], ignore_errors=True)


def recover(state: State) -> list[Intent]:
    """Finish what a kill left between finished and done, clean up; return what was finished.

    An intent whose outputs someone removed meanwhile is forgotten: its step runs again. One whose
    outputs cannot be moved is a failure of its step, which the next run tries again.
    """
    finished = []
    for intent in state.intents():
        staged = any((state.out / source).exists() for source, _ in intent.moves)
        if staged or all((state.out / path).exists() for path in intent.outputs):
            try:
                publish(state, intent)
                finished.append(intent)
            except UsageError as err:
                state.failed(
                    *(intent.recipe, intent.step, intent.key, intent.seconds),
                    *(str(err), err.exit_code),
                    lasting=False,
                )
        else:
            state.forget(intent)
    clean(state.out)
    return finished


def clean(out: Path) -> None:
    """Remove what unfinished steps left in the stage, and replaced folders.

    Only when no intent is left: a committed one still needs its stage.
    """
    for name in (STAGE, _TRASH):
        shutil.rmtree(out / name, ignore_errors=True)


def require_free_name(folder: Path) -> None:
    """Refuse to replace a folder that is no recipe.

    Raises:
        UsageError: it holds something else.
    """
    if folder.is_dir() and not (folder / "recipe.json").exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is no recipe folder: choose another out or --name")
    if folder.is_file():
        raise UsageError(f"{folder} is a file: choose another out or --name")


def _move(out: Path, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and target.is_dir():
        trash = out / _TRASH
        trash.mkdir(parents=True, exist_ok=True)
        old = Path(tempfile.mkdtemp(dir=trash)) / "old"
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old.parent, ignore_errors=True)
    else:
        os.replace(source, target)
    _sync_folders({target.parent, source.parent})


def _sync_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
