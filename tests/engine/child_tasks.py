"""Tasks that misbehave in known ways, for test_child."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from quantmix.engine.child import Emit
from quantmix.errors import BadFile


def count(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    print("noise on stdout, as native code makes it")
    for i in range(request["n"]):
        emit({"i": i})
    return {"sum": sum(range(request["n"]))}


def refuse(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    raise BadFile("no such thing")


def crash(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    os.write(2, b"GGML_ASSERT of a kind failed\n")
    os.abort()


def bug(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    return {"x": 1 // len(sys.argv[2:])}


def sleep(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    Path(request["note"]).write_text(str(os.getpid()))
    time.sleep(60)
    return {}
