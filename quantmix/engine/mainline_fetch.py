"""Bring a complete mainline libllama into the user's cache.

`python -m quantmix.engine.mainline_fetch` does it. The npm package `@node-llama-cpp/linux-x64` is
llama.cpp built for the CPU, quantizer included; nothing is compiled and nothing runs at
installation. npm checks its digest; it is unpacked by us.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from quantmix.errors import EngineError, EngineMissing
from quantmix.files import cache_folder

VERSION: Final = "3.22.1"  # llama.cpp 0.5.0 (build 11434)
_NPM_SECONDS: Final = 600
_FOLDERS: Final = {"x86_64": "linux-x64", "aarch64": "linux-arm64"}


def platform_folder() -> str:
    """Name of the package for this machine, as in `@node-llama-cpp/<name>`.

    Raises:
        EngineMissing: no such package for this machine.
    """
    name = _FOLDERS.get(platform.machine()) if platform.system() == "Linux" else None
    if name is None:
        raise EngineMissing(
            f"no ready-made mainline build for {platform.system()} {platform.machine()}: build "
            "llama.cpp with shared libraries and set QUANTMIX_LIBLLAMA to its folder"
        )
    return name


def fetched_folder(version: str = VERSION) -> Path | None:
    """Return the folder of libraries that `fetch` filled, or None when it has not run."""
    if platform.system() != "Linux" or platform.machine() not in _FOLDERS:
        return None
    folder = _target(version) / "bins" / platform_folder()
    return folder if any(folder.glob("libllama.*so*")) else None


def fetch(version: str = VERSION) -> Path:
    """Download and unpack the package unless it is there; return its folder of libraries.

    Raises:
        EngineMissing: npm is absent, or there is no package for this machine.
        EngineError: npm failed (its last line is shown), or the package is not what it should be.
    """
    name = platform_folder()
    have = fetched_folder(version)
    if have is not None:
        return have
    npm = shutil.which("npm")
    if npm is None:
        raise EngineMissing(
            "npm is not installed, and it is what brings the mainline library: install nodejs and "
            "npm, or set QUANTMIX_LIBLLAMA to a folder with libllama.so"
        )
    target = _target(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive = _pack(npm, f"@node-llama-cpp/{name}@{version}", Path(scratch))
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        try:
            (Path(scratch) / "package").rename(target)
        except OSError:  # another process was faster
            if fetched_folder(version) is None:
                raise
    folder = fetched_folder(version)
    if folder is None:
        raise EngineError(f"the package @node-llama-cpp/{name}@{version} holds no libllama")
    return folder


def release(folder: Path) -> str:
    """Return the llama.cpp release that a folder of the package was built from, `` if unknown."""
    try:
        doc = json.loads((folder / "_nlcBuildMetadata.json").read_text(encoding="utf-8"))
        return str(doc["buildOptions"]["llamaCpp"]["release"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _target(version: str) -> Path:
    return cache_folder() / "node-llama-cpp" / version


def _pack(npm: str, spec: str, folder: Path) -> Path:
    """Run `npm pack`, which downloads the archive and checks its digest; return the archive."""
    try:
        done = subprocess.run(
            [npm, "pack", spec, "--ignore-scripts", "--pack-destination", str(folder)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_NPM_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"`npm pack {spec}` took over {_NPM_SECONDS} s: try again") from None
    archives = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise EngineError(f"`npm pack {spec}` failed: {last}")
    return archives[0]


def main() -> int:
    """Fetch and print the folder; one line on stderr and exit code 4 when that fails."""
    try:
        folder = fetch()
    except EngineError as err:
        print(f"quantmix: {err}", file=sys.stderr)
        return err.exit_code
    print(f"{folder} (llama.cpp {release(folder)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
