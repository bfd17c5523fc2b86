"""How the model will be run: everything that decides memory besides the weights."""

from __future__ import annotations

from dataclasses import dataclass

from quantmix.ggml.types import Engine

# Newest builds whose behaviour is known (docs/sources.md).
NEWEST_BUILD: dict[Engine, str] = {"ik": "2026-08-15", "mainline": "2026-10-01"}
# Logs of older builds were not read (docs/memory-model.md).
OLDEST_BUILD = "2025-03-01"


@dataclass(frozen=True, slots=True)
class Settings:
    """Launch settings, spelled as the engines' flags.

    Attributes:
        engine: `ik` or `mainline`.
        build: ISO date of the engine build; memory behaviour changes with it.
        ctx: `-c`, total over slots, a multiple of 256.
        ctk, ctv: KV cache types.
        ubatch, batch: `-ub`, `-b`.
        parallel: server slots (`-np`).
        mla: ik's `-mla` 0..3; meaningless for models without MLA and for mainline.
        amb: ik's `-amb` in MiB, 0 = off.
        fa: flash attention.
        nkvo: KV cache in RAM. mtp: load and run the MTP block.
        cram_mib: the server's prompt cache in RAM (`-cram`).
    """

    engine: Engine = "ik"
    build: str = NEWEST_BUILD["ik"]
    ctx: int = 32768
    ctk: str = "f16"
    ctv: str = "f16"
    ubatch: int = 512
    batch: int = 2048
    parallel: int = 1
    mla: int = 3
    amb: int = 256
    fa: bool = True
    nkvo: bool = False
    mtp: bool = False
    cram_mib: int = 0
