"""Split files: every shard finds the rest; sets that do not belong together are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quantmix.errors import BadFile
from quantmix.ggml.header import read_header
from quantmix.ggml.shards import read_set
from quantmix.ggml.types import get
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata

F32 = get("f32")


def shard(path: Path, names: list[str], **metadata: object) -> None:
    """Write one shard."""
    tensors = [NewTensor(n, (8,), F32) for n in names]
    head, data = encode_header(encode_metadata(metadata), tensors)
    path.write_bytes(head + bytes(data))


def split(folder: Path, parts: list[list[str]], **extra: object) -> list[Path]:
    """Write a whole set and return its paths."""
    total = sum(map(len, parts))
    paths = []
    for i, names in enumerate(parts):
        path = folder / f"m-{i + 1:05d}-of-{len(parts):05d}.gguf"
        keys: dict[str, object] = {"general.name": "M"} if i == 0 else {}
        keys |= {"split.no": i, "split.count": len(parts), "split.tensors.count": total}
        shard(path, names, **(keys | extra))
        paths.append(path)
    return paths


def test_any_shard_finds_the_rest(tmp_path: Path) -> None:
    """Given any shard or the folder, all tensors come in order, with the first one's metadata."""
    paths = split(tmp_path, [["a", "b"], ["c"], ["d"]])
    for given in (*paths, tmp_path):
        found = read_set(given)
        assert [t.name for t in found.tensors] == ["a", "b", "c", "d"]
        assert found.metadata["general.name"] == "M"
        assert found.name == "m"


def test_header_bytes_of_the_merged_file(tmp_path: Path) -> None:
    """The header of a set as one file holds all tensors and no split keys."""
    parts = split(tmp_path, [["a", "b"], ["c"]])
    whole = tmp_path / "whole.gguf"
    shard(whole, ["a", "b", "c"], **{"general.name": "M"})
    assert read_set(parts[1]).header_bytes == read_header(whole).data_offset
    assert read_set(whole).header_bytes == read_header(whole).data_offset


def test_missing_shards_are_named(tmp_path: Path) -> None:
    """Missing shards are counted and named."""
    paths = split(tmp_path, [["a"], ["b"], ["c"]])
    paths[1].unlink()
    with pytest.raises(BadFile, match="1 of 3 shards are missing: m-00002-of-00003"):
        read_set(paths[0])


def test_swapped_shards_are_refused(tmp_path: Path) -> None:
    """A shard under another's name, as in a cycle of links, is refused."""
    paths = split(tmp_path, [["a"], ["b"]])
    paths[1].unlink()
    paths[1].symlink_to(paths[0])
    with pytest.raises(BadFile, match="shard 1 by its metadata, 2 by its name"):
        read_set(paths[0])
    paths[0].unlink()
    paths[0].symlink_to(paths[1])
    with pytest.raises(BadFile):
        read_set(paths[0])


def test_mixed_sets_are_refused(tmp_path: Path) -> None:
    """Counts that contradict, tensors twice and tensors lost are refused."""
    other = tmp_path / "other"
    other.mkdir()
    paths = split(tmp_path, [["a"], ["b"]])
    three = split(other, [["a"], ["b"], ["c"]])
    shutil.copy(three[1], paths[1])
    with pytest.raises(BadFile, match="one of 3 shards"):
        read_set(paths[0])
    split(tmp_path, [["a"], ["a"]])
    with pytest.raises(BadFile, match="'a' is in both"):
        read_set(paths[0])
    split(tmp_path, [["a"], ["b"]], **{"split.tensors.count": 5})
    with pytest.raises(BadFile, match="hold 2 tensors, their header says 5"):
        read_set(paths[0])
    lone = tmp_path / "lone.gguf"
    shutil.copy(three[0], lone)
    with pytest.raises(BadFile, match="one of 3 shards"):
        read_set(lone)


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf"])
def test_impossible_numbers(tmp_path: Path, name: str) -> None:
    """A shard number outside its count is refused."""
    shard(tmp_path / name, ["a"])
    with pytest.raises(BadFile, match="cannot be"):
        read_set(tmp_path / name)


def test_folder_must_hold_one_model(tmp_path: Path) -> None:
    """An empty folder and one with several models are refused; projectors do not count."""
    with pytest.raises(BadFile, match="no GGUF model"):
        read_set(tmp_path)
    shard(tmp_path / "one.gguf", ["a"])
    shard(tmp_path / "mmproj-one.gguf", ["v"])
    assert [t.name for t in read_set(tmp_path).tensors] == ["a"]
    shard(tmp_path / "two.gguf", ["a"])
    with pytest.raises(BadFile, match="2 models"):
        read_set(tmp_path)
    with pytest.raises(BadFile, match="is not a file"):
        read_set(tmp_path / "absent-00001-of-00002.gguf")


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
@pytest.mark.parametrize("value", ["1", [1, 2], True, 1.5])
def test_numbers_of_a_split_are_whole_numbers(tmp_path: Path, key: str, value: object) -> None:
    """A string, an array, a truth value or a fraction in their place is named, with the file."""
    paths = split(tmp_path, [["a"], ["b"]], **{key: value})
    with pytest.raises(BadFile, match=rf"m-00001-of-00002.gguf: {key} is .*no whole number"):
        read_set(paths[0])
