"""Flags that several commands take, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[
    str, typer.Argument(help="Catalog name, GGUF file or folder, hf:org/name or URL.")
]
Layout = Annotated[str | None, typer.Option(help="MLA layout of the source: split, ik or legacy.")]
Engine = Annotated[str, typer.Option(help="ik or mainline.")]
EngineBuild = Annotated[
    str | None, typer.Option(help="Date of the engine's build (default: newest known).")
]

# Devices
Vram = Annotated[str | None, typer.Option(help="One idealised device of exactly this size.")]
Gpus = Annotated[str | None, typer.Option(help="Cards in CUDA order: 2xrtx-5090,2x24G; or none.")]
RigName = Annotated[str | None, typer.Option(help="A rig by name or TOML file.")]
Ram = Annotated[str | None, typer.Option(help="Installed RAM that may hold weights.")]
RamReserve = Annotated[
    str | None, typer.Option(help="RAM set aside (default: 4 GiB or 5%, the larger).")
]
Reserve = Annotated[str | None, typer.Option(help="Set aside per GPU (default: auto).")]
Desktop = Annotated[
    bool, typer.Option("--desktop", help="The first GPU drives a desktop: 800 MiB more.")
]
Cpu = Annotated[
    str | None, typer.Option(help="CPU platform of the RAM, for speed: see `quantmix rigs`.")
]
CpuCores = Annotated[int | None, typer.Option(help="Physical cores.")]

# Launch
Ctx = Annotated[str, typer.Option(help="Context over all slots: 32768, 32k, or max.")]
Ctk = Annotated[str, typer.Option(help="Type of the K cache.")]
Ctv = Annotated[
    str | None, typer.Option(help="Type of the V cache (default: f16, or --ctk for MLA).")
]
Ubatch = Annotated[int | None, typer.Option(help="Physical batch (default 512).")]
Batch = Annotated[int | None, typer.Option(help="Logical batch (default 2048).")]
Profile = Annotated[str | None, typer.Option(help="prompt or generate: chooses ubatch.")]
Parallel = Annotated[int, typer.Option(help="Server slots.")]
Mla = Annotated[int, typer.Option(help="ik's MLA mode.")]
Amb = Annotated[int, typer.Option(help="ik's attention buffer, MiB.")]
Nkvo = Annotated[bool, typer.Option("--nkvo", help="KV cache in RAM.")]
Mtp = Annotated[bool, typer.Option("--mtp", help="Load and run the multi-token block (ik).")]

# Types
Types = Annotated[str | None, typer.Option(help="Only these types, comma separated.")]
Pins = Annotated[list[str] | None, typer.Option(help="REGEX=TYPE: fix the type of tensors.")]
Floors = Annotated[list[str] | None, typer.Option(help="REGEX=TYPE: no worse than this type.")]
NoImatrix = Annotated[bool, typer.Option("--no-imatrix", help="There is no importance matrix.")]
MeasurementsFile = Annotated[
    Path | None, typer.Option(help="Sensitivities measured by `quantmix measure`.")
]
