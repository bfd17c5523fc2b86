"""Ghosts: true headers without data, read back by our reader, the gguf package and real ik."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import gguf
import pytest

from quantmix.errors import UsageError
from quantmix.ggml.header import read_header
from quantmix.models.catalog import catalog
from quantmix.models.ghost import write_ghost
from quantmix.models.metadata import gguf_metadata
from quantmix.models.sources import load_model

ONE_PER_ARCH = list({e.arch: e.id for e in catalog().values()}.values())


@pytest.mark.parametrize("model_id", ONE_PER_ARCH)
def test_ghost_reads_back(model_id: str, tmp_path: Path) -> None:
    """Names, shapes, types and metadata come back; the file takes almost no disk."""
    model = load_model(model_id)
    path = tmp_path / "ghost.gguf"
    size = write_ghost(path, model)
    header = read_header(path)
    assert [(t.name, t.shape) for t in header.tensors] == [(t.name, t.shape) for t in model.tensors]
    kinds = {t.name: t.type.name for t in header.tensors}
    assert all(kinds[t.name] == ("iq2_bn" if t.quantizable else "f32") for t in model.tensors)
    plain = {k: header.list_of(k) or v for k, v in header.metadata.items()}
    wanted = {k: list(v) if isinstance(v, tuple | list) else v for k, v in plain.items()}
    assert wanted == {
        k: pytest.approx(v) if isinstance(v, float) else list(v) if isinstance(v, tuple) else v
        for k, v in gguf_metadata(model).items()
    }
    assert path.stat().st_size == size
    assert path.stat().st_blocks * 512 < 1 << 20


def test_ghost_with_designed_types_equals_the_gguf_package(tmp_path: Path) -> None:
    """A mainline ghost with types by name reads the same in the gguf package, offsets included."""
    model = load_model("smollm2-135m")
    types = {t.name: "q8_0" if t.quantizable else "f32" for t in model.tensors}
    path = tmp_path / "ghost.gguf"
    write_ghost(path, model, types, engine="mainline")
    ours = read_header(path)
    theirs = gguf.GGUFReader(path)
    assert [(t.name, list(t.shape), t.type.id) for t in ours.tensors] == [
        (t.name, [int(n) for n in t.shape], int(t.tensor_type)) for t in theirs.tensors
    ]
    assert [ours.data_offset + t.offset for t in ours.tensors] == [
        int(t.data_offset) for t in theirs.tensors
    ]


def test_ghost_needs_a_type_for_every_tensor(tmp_path: Path) -> None:
    """A tensor that the mapping leaves out is named."""
    with pytest.raises(UsageError, match=r"token_embd\.weight"):
        write_ghost(tmp_path / "g.gguf", load_model("smollm2-135m"), {})


def test_full_disk_or_bad_folder_is_one_clear_error(tmp_path: Path) -> None:
    """A path that cannot be written is an error of ours, not a traceback."""
    with pytest.raises(UsageError, match="sparse file"):
        write_ghost(tmp_path / "absent" / "g.gguf", load_model("smollm2-135m"))


@pytest.mark.engine
@pytest.mark.parametrize("layout", ["split", "ik", "legacy"])
def test_ik_walks_every_tensor_of_deepseek_r1(layout: str, tmp_path: Path) -> None:
    """The real llama-quantize accepts the ghost and applies a rule to all tensors in seconds."""
    binary = _ik_quantize()
    model = load_model("deepseek-r1", layout=layout)
    write_ghost(tmp_path / "g.gguf", model)
    rules = r"\.attn_.*weight$=q8_0,.*=iq2_kt"
    files = [str(tmp_path / "g.gguf"), str(tmp_path / "out.gguf")]
    out = subprocess.run(
        [binary, "--dry-run", "--ignore-imatrix-rules", "--custom-q", rules, *files, "IQ2_KT"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert len(re.findall(r"^\[ *\d+/ *\d+\]", out, re.M)) == len(model.tensors)
    assert out.count("converting to") == sum(t.quantizable for t in model.tensors)
    assert "converting to iq2_kt" in out
    assert not os.path.exists(tmp_path / "out.gguf") or not (tmp_path / "out.gguf").stat().st_size


def _ik_quantize() -> str:
    package = pytest.importorskip("ik_llama_cpp")
    return str(Path(package.__file__).parent / "bin" / "llama-quantize")
