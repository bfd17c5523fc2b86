"""Programs that no package ships, built from published sources against the packaged libraries.

`ik-llama-cpp-python` installs ik's libraries and `llama-quantize`; its source package also holds
`llama-perplexity` and `llama-imatrix`. Both are compiled here, linked to the installed libraries,
and kept in the cache folder. Tests that need them are skipped without a compiler or the package.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from quantmix.engine import native
from quantmix.files import cache_folder

PACKAGE = "ik-llama-cpp-python"
FOLDERS = ("/examples/", "/include/", "/ggml/include/", "/common/", "/src/", "/vendor/nlohmann/")
# What the two programs use of `common`. Chat templates and grammars, which they never call, are
# left out: their three entry points abort.
COMMON = ("common.cpp", "sampling.cpp", "log.cpp")
REST = """
#include <cstdlib>
#include "chat.h"
#include "json-schema-to-grammar.h"
int LLAMA_BUILD_NUMBER = 1;
char const *LLAMA_COMMIT = "source", *LLAMA_COMPILER = "g++", *LLAMA_BUILD_TARGET = "test";
bool common_chat_verify_template(const std::string &, bool) { abort(); }
common_reasoning_format common_reasoning_format_from_name(const std::string &) { abort(); }
std::string json_schema_to_grammar(const nlohmann::ordered_json &, bool) { abort(); }
"""


def ik_programs(scratch: Path) -> Path:
    """Return the folder of ik's llama-perplexity and llama-imatrix; build what is missing."""
    version = importlib.metadata.version(PACKAGE)
    target = cache_folder() / "ik-programs" / version
    wanted = [n for n in ("perplexity", "imatrix") if not (target / f"llama-{n}").exists()]
    if not wanted:
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build ik's llama-perplexity")
    source = _unpack(f"{PACKAGE}=={version}", scratch)
    (scratch / "rest.cpp").write_text(REST)
    compile_one = [compiler, "-O1", "-std=c++20", "-w", "-c", "-I" + str(source / "vendor")]
    compile_one += [f"-I{source / d}" for d in ("include", "ggml/include", "common", "src")]
    parts = [source / "common" / name for name in COMMON]
    parts += [source / "examples" / n / f"{n}.cpp" for n in wanted] + [scratch / "rest.cpp"]
    objects = {p: scratch / f"{p.stem}.o" for p in parts}
    running = [
        subprocess.Popen([*compile_one, "-o", str(out), str(part)]) for part, out in objects.items()
    ]
    assert [p.wait(timeout=600) for p in running] == [0] * len(running)
    target.mkdir(parents=True, exist_ok=True)
    package = native.package_folder()
    repaired = package.parent / "ik_llama_cpp_python.libs"
    libraries = [package / "lib" / "libllama.so", *sorted(repaired.glob("lib*.so*"))]
    # The old kind of search path, which also serves what the libraries themselves need.
    paths = f"-Wl,--disable-new-dtags,-rpath,{package / 'lib'}:{repaired}"
    for name in wanted:
        skip = {f"{n}.cpp" for n in wanted if n != name}
        used = [out for part, out in objects.items() if part.name not in skip]
        program = scratch / f"llama-{name}"
        subprocess.run(
            [compiler, "-o", *map(str, (program, *used, *libraries)), "-lpthread", paths],
            check=True,
            timeout=300,
        )
        shutil.copy(program, target / program.name)
    return target


def _unpack(requirement: str, scratch: Path) -> Path:
    """Download a source package; return the folder of the engine's source in it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    got = subprocess.run([*command, "-d", str(scratch), requirement], check=False, timeout=300)
    if got.returncode != 0:
        pytest.skip(f"pip could not download the source of {requirement}")
    with tarfile.open(next(iter(scratch.glob("*.tar.gz")))) as tar:
        members = [m for m in tar.getmembers() if any(w in m.name for w in FOLDERS)]
        tar.extractall(scratch, members=members, filter="data")
    return next(iter(scratch.glob("*/vendor/*llama.cpp")))
