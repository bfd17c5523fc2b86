"""The recipe folder: written whole, and written again without loss of anybody's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import quantmix as qm
from quantmix.budget import Budget
from quantmix.emit.folder import write_folder
from quantmix.engine.quantize import compare
from quantmix.errors import BadFile, UsageError
from quantmix.ggml import types
from quantmix.ggml.weights import open_weights
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata, write_sparse
from quantmix.recipe import Recipe, load
from quantmix.verify import find_target


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A small recipe."""
    return qm.design(qm.load_model("qwen3-0.6b"), Budget.from_vram("6G"))


@pytest.fixture(scope="module")
def other() -> Recipe:
    """Another mix for the same model, without devices."""
    return qm.design(qm.load_model("qwen3-0.6b"), Budget.from_size("4bpw"))


def make_gguf(recipe: Recipe, path: Path, part: slice = slice(None), **keys: int) -> None:
    """Write a file, or a shard, of the types that a recipe plans, without data."""
    kv = encode_metadata({"general.architecture": "qwen3", **keys})
    planned = [NewTensor(t.name, t.shape, types.get(t.type)) for t in recipe.tensors[part]]
    write_sparse(path, *encode_header(kv, planned))


def test_other_files_stay(recipe: Recipe, tmp_path: Path) -> None:
    """Written again, a folder keeps the GGUF that fits and every file and folder of others."""
    place = recipe.save(tmp_path / "x")
    make_gguf(recipe, place / "m.gguf")
    (place / "own").mkdir()
    (place / "own" / "notes.txt").write_text("mine")
    (place / "verify.json").write_text("{}")
    again = write_folder(replace(recipe, created="later"), place, figures=False)
    assert again.notes == ()
    assert load(place).created == "later"
    assert (place / "own" / "notes.txt").read_text() == "mine"
    assert (place / "verify.json").read_text() == "{}"
    assert not (place / "types.png").exists()
    compare(recipe, open_weights(find_target(place).file))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_gguf_that_no_longer_fits_is_set_aside(
    recipe: Recipe, other: Recipe, tmp_path: Path
) -> None:
    """It moves, with its recipe and what was measured of it, to where `verify` finds both."""
    place = recipe.save(tmp_path / "x", figures=False)
    make_gguf(recipe, place / "m.gguf")
    for name in ("verify.json", "imatrix.dat"):
        (place / name).write_text(name)
    (place / "source.gguf").write_bytes(b"of another kind")
    (note,) = write_folder(other, place, figures=False).notes
    assert "m.gguf" in note
    assert str(place / "earlier-1") in note
    assert load(place).to_json() == other.to_json()
    assert not (place / "serve.sh").exists()
    assert {p.name for p in place.glob("*.gguf")} == {"source.gguf"}
    assert (place / "imatrix.dat").read_text() == "imatrix.dat"
    earlier = find_target(place / "earlier-1")
    assert earlier.recipe is not None
    assert earlier.recipe.to_json() == recipe.to_json()
    compare(earlier.recipe, open_weights(earlier.file))
    assert (place / "earlier-1" / "verify.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_shards_are_set_aside_together(recipe: Recipe, other: Recipe, tmp_path: Path) -> None:
    """All shards move; a second file set aside gets the next number."""
    place = recipe.save(tmp_path / "x", figures=False)
    half = len(recipe.tensors) // 2
    for i, part in enumerate((slice(0, half), slice(half, None))):
        shard = place / f"m-0000{i + 1}-of-00002.gguf"
        make_gguf(recipe, shard, part, **{"split.no": i, "split.count": 2})
    write_folder(other, place, figures=False)
    make_gguf(other, place / "m.gguf")
    write_folder(recipe, place, figures=False)
    assert list(place.glob("*.gguf")) == []
    compare(recipe, open_weights(find_target(place / "earlier-1").file))
    compare(other, open_weights(find_target(place / "earlier-2").file))


def test_a_swap_that_fails_puts_the_old_folder_back(
    recipe: Recipe, other: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the new folder cannot be moved to its place, the old one is there as it was."""
    place = recipe.save(tmp_path / "x", figures=False)
    (place / "m.gguf").write_bytes(b"GGUF")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == place and self.name != "recipe":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UsageError, match="Input/output error"):
        write_folder(other, place, figures=False)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_is_no_recipe_is_told_apart(recipe: Recipe, tmp_path: Path) -> None:
    """A folder of recipes names one of them, a GGUF the command that makes a recipe of it."""
    made = recipe.save(tmp_path / "all" / "x", figures=False)
    with pytest.raises(BadFile, match=f"is a folder of recipes: name one, like {made}"):
        load(tmp_path / "all")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\xc3\x28")
    with pytest.raises(BadFile, match=r"m\.gguf is no recipe of quantmix .*quantmix clone"):
        load(tmp_path / "m.gguf")


def test_a_source_whose_name_is_no_utf8_is_remembered(recipe: Recipe, tmp_path: Path) -> None:
    """recipe.json is UTF-8 and names the very file."""
    odd = replace(recipe, model=replace(recipe.model, source="m\udcff.gguf"))
    assert load(odd.save(tmp_path / "x", figures=False)).model.source == "m\udcff.gguf"


def test_a_linked_folder_is_written_where_it_lies(recipe: Recipe, tmp_path: Path) -> None:
    """A symbolic link to a recipe folder stays a link."""
    real = recipe.save(tmp_path / "disk" / "x", figures=False)
    (real / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "link").symlink_to(real)
    write_folder(replace(recipe, created="later"), tmp_path / "link", figures=False)
    assert (tmp_path / "link").is_symlink()
    assert load(real).created == "later"
    assert (real / "m.gguf").exists()
