"""What mainline llama.cpp itself says about a ghost: the type of every tensor, and the memory.

Two ways lead to a dry run and give the same result: the user's `llama-quantize --dry-run
--tensor-type-file`, or `llama_model_quantize` of a libllama with `dry_run` set. Neither reads data,
so a ghost with bf16 matrices serves. Rules are (pattern, type) pairs; the first match wins; the
program lowercases patterns (tools/quantize/quantize.cpp, parse_tensor_type), so the library gets
them lowercased too.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantmix.engine.dry_run import DryTensor, read_tensor
from quantmix.engine.mainline_abi import FLOAT_FTYPES, FTYPES
from quantmix.engine.mainline_ask import ask, child_environment, last_words
from quantmix.engine.mainline_find import Mainline, find_mainline
from quantmix.errors import EngineError, UnknownName, UsageError
from quantmix.ggml import types
from quantmix.memory.settings import Settings
from quantmix.units import MIB, pad

Rules = Iterable[tuple[str, str]]

_PROGRAM_SECONDS: Final = 600
_TENSOR_LINE: Final = re.compile(
    r"\[\s*\d+/\s*(?P<total>\d+)\]\s+(?P<name>\S+)\s+-\s+\[(?P<shape>[\d ,]+)\],"
    r"\s+type\s*=\s*(?P<old>\w+),\s+size =\s*(?P<before>[\d.]+) MiB"
    r"(?:\s+->\s*(?P<after>[\d.]+) MiB \((?P<new>\w+)\))?"
)
_FALLBACK_LINE: Final = re.compile(r"warning: (?P<name>\S+)\s+- ncols\s+\d+ not divisible by")
_TOTAL_LINE: Final = re.compile(r"quant size\s+=\s*([\d.]+) MiB \(\s*([\d.]+) BPW\)")
# Buffers that hold the same thing on the host under several names.
_HOST_BUFFERS: Final = ("CPU", "CUDA_Host", "ROCm_Host", "SYCL_Host", "Vulkan_Host", "CPU_Mapped")


@dataclass(frozen=True, slots=True)
class DryRun:
    """A dry run over a whole file, tensors in the engine's order.

    `needs_imatrix`: the engine says that a real run would refuse without one.
    """

    tensors: Mapping[str, DryTensor]
    printed_total_mib: float
    printed_bpw: float
    needs_imatrix: bool
    engine: Mainline

    @property
    def total_bytes(self) -> int:
        """Sum over tensors, padding left out."""
        return sum(t.bytes for t in self.tensors.values())


@dataclass(frozen=True, slots=True)
class DeviceBuffers:
    """Bytes on one device: weights, context (KV cache and recurrent state), compute buffer.

    The small buffer of logits that a context also holds on the host is in none of them.
    """

    weights_bytes: int
    context_bytes: int
    compute_bytes: int


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes per device as the engine counts them; host buffers of all kinds are `CPU`."""

    devices: Mapping[str, DeviceBuffers]
    engine: Mainline

    @property
    def total(self) -> DeviceBuffers:
        """Sum over devices."""
        found = self.devices.values()
        return DeviceBuffers(
            sum(d.weights_bytes for d in found),
            sum(d.context_bytes for d in found),
            sum(d.compute_bytes for d in found),
        )


def rules_of(wanted: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return one anchored rule per tensor of `wanted` (name to type)."""
    return tuple((f"^{re.escape(name)}$", qtype) for name, qtype in wanted.items())


def dry_run(
    ghost: Path,
    rules: Rules,
    ftype: str = "Q4_K_M",
    *,
    engine: Mainline | None = None,
    imatrix: bool = False,
) -> DryRun:
    """Return what mainline would make of every tensor of a GGUF; nothing is read or written.

    Args:
        ghost: a GGUF whose data may be a hole.
        rules: (pattern, ggml type) pairs in order; see `rules_of`.
        ftype: the preset, which decides what no rule names; a quantized one, or rules are ignored.
        engine: which engine; default the first found.
        imatrix: as if with an importance matrix, which some presets ask for (libraries only).

    Raises:
        UsageError: a rule or preset that mainline would ignore or misread.
        EngineMissing: no mainline that can quantize was found.
        EngineError: the engine refused or died; its own words are shown.
    """
    checked = _checked_rules(rules, ftype)
    used = engine or find_mainline("quantize", libraries_only=imatrix)
    if used.program is not None and not imatrix:
        log, blocks = _run_program(used.program, ghost, checked, ftype), None
    elif used.library is not None and used.quantizes:
        request = {
            "do": "quantize",
            "ghost": str(ghost),
            "rules": checked,
            "ftype": FTYPES[ftype],
            "imatrix": imatrix,
        }
        answer = ask(used.library, request)
        log, blocks = answer.log, {n: (b, s) for n, b, s in answer.document}
    else:
        raise EngineError(f"{used.origin} has no quantizer")
    return parse_dry_run(log, used, blocks)


def parse_dry_run(
    log: str, engine: Mainline, blocks: Mapping[str, tuple[int, int]] | None = None
) -> DryRun:
    """Read the log of a dry run; `blocks` are (block size, bytes per block) by type name.

    Raises:
        EngineError: the log names fewer tensors than it counts, or a total is missing.
    """
    fallen = {m["name"] for m in _FALLBACK_LINE.finditer(log)}
    tensors: dict[str, DryTensor] = {}
    total = 0
    for match in _TENSOR_LINE.finditer(log):
        tensors[match["name"]] = _tensor(match, fallen, blocks)
        total = int(match["total"])
    end = _TOTAL_LINE.search(log)
    if end is None or not tensors or len(tensors) != total:
        raise EngineError(
            f"mainline's dry run named {len(tensors)} of {total} tensors: {last_words(log)}"
        )
    return DryRun(
        tensors=tensors,
        printed_total_mib=float(end[1]),
        printed_bpw=float(end[2]),
        needs_imatrix="will require an imatrix" in log,
        engine=engine,
    )


def measure_memory(
    ghost: Path, settings: Settings, *, engine: Mainline | None = None
) -> EngineMemory:
    """Return the bytes mainline would allocate for a GGUF on the CPU, allocating nothing.

    Slots have their own cells (`--no-kv-unified`), the logits of a whole ubatch are wanted (as in
    llama-perplexity; a server wants fewer), and tensors are not repacked.

    Raises:
        EngineMissing: no mainline libllama was found.
        EngineError: the engine refused the file or the settings; its own words are shown.
    """
    used = engine or find_mainline("memory")
    if used.library is None:
        raise EngineError(f"{used.origin} has no library to ask")
    request = {
        "do": "memory",
        "ghost": str(ghost),
        "context": context_fields(settings),
        "load_mtp": settings.mtp,
    }
    answer = ask(used.library, request)
    devices: dict[str, list[int]] = {}
    for row in answer.document:
        name = "CPU" if row["buffer"] in _HOST_BUFFERS else str(row["buffer"])
        sums = devices.setdefault(name, [0, 0, 0])
        for i, key in enumerate(("weights", "context", "compute")):
            sums[i] += int(row[key])
    memory = EngineMemory({n: DeviceBuffers(*s) for n, s in devices.items()}, used)
    _compare_with_log(memory, answer.log)
    return memory


def context_fields(settings: Settings) -> dict[str, Any]:
    """Return the fields of llama_context_params that `settings` decide.

    Raises:
        UnknownName: a cache type that mainline does not have.
    """
    slots = max(1, settings.parallel)
    return {
        "n_ctx": pad(settings.ctx, 256),
        "n_batch": max(settings.batch, settings.ubatch),
        "n_ubatch": settings.ubatch,
        "n_seq_max": slots,
        "flash_attn_type": 1 if settings.fa else 0,
        "type_k": types.get(settings.ctk, "mainline").id,
        "type_v": types.get(settings.ctv, "mainline").id,
        "offload_kqv": not settings.nkvo,
        "swa_full": False,
        "kv_unified": False,
    }


def type_sizes(engine: Mainline, lengths: Iterable[int]) -> list[dict[str, Any]]:
    """Return name, block size, type size and row bytes at `lengths` of every type, by type id.

    Raises:
        EngineError: the library cannot be asked.
    """
    if engine.library is None:
        raise EngineError(f"{engine.origin} has no library to ask")
    answer = ask(engine.library, {"do": "types", "lengths": sorted(set(lengths))})
    return list(answer.document)


def _checked_rules(rules: Rules, ftype: str) -> list[tuple[str, str]]:
    """Return the rules as the program would hold them: patterns lowercased (ASCII only)."""
    if ftype not in FTYPES:
        raise UnknownName.of("mainline preset", ftype, FTYPES)
    checked = []
    for pattern, qtype in rules:
        if ftype in FLOAT_FTYPES:
            raise UsageError(
                f"mainline ignores rules under the preset {ftype}: use a quantized one"
            )
        if not pattern or re.search(r"[\s=]", pattern):
            raise UsageError(f"rule pattern {pattern!r} may hold neither blanks nor '='")
        lowered = pattern.encode().lower().decode()
        checked.append((lowered, types.get(qtype, "mainline").name))
    return checked


def _run_program(program: Path, ghost: Path, rules: list[tuple[str, str]], ftype: str) -> str:
    """Run `llama-quantize --dry-run` and return all it printed."""
    with tempfile.TemporaryDirectory(prefix="quantmix-") as folder:
        command = [str(program.absolute()), "--dry-run"]
        if rules:
            file = Path(folder) / "types.txt"
            file.write_text("".join(f"{p}={t}\n" for p, t in rules), encoding="utf-8")
            command += ["--tensor-type-file", str(file)]
        output = Path(folder) / "nothing-is-written.gguf"
        command += [str(ghost.absolute()), str(output), ftype, "1"]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_PROGRAM_SECONDS,
                check=False,
                cwd=folder,
                env=child_environment(),
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"{program.name} took over {_PROGRAM_SECONDS} s") from None
        except OSError as err:
            raise EngineError(f"{program} cannot be run: {err}") from err
    if done.returncode != 0:
        raise EngineError(f"{program.name} failed: {last_words(done.stdout)}")
    return done.stdout


def _tensor(
    match: re.Match[str], fallen: set[str], blocks: Mapping[str, tuple[int, int]] | None
) -> DryTensor:
    """Read one line of the list."""
    name, new = match["name"], match["new"] or match["old"]
    known = types.get(new, "mainline")
    block, size = (known.block_size, known.type_size) if blocks is None else blocks[new]

    def row_bytes(ncols: int) -> int:
        return ncols // block * size

    printed = match["after"] or match["before"]
    return read_tensor(name, match["shape"], new, printed, row_bytes, fell_back=name in fallen)


def _compare_with_log(memory: EngineMemory, log: str) -> None:
    """Check the sizes read from the engine's structures against those it logged.

    Raises:
        EngineError: they disagree, so the structures were misread.
    """
    logged = [float(x) for x in re.findall(r"compute buffer size =\s*([\d.]+) MiB", log)]
    if logged and abs(sum(logged) - memory.total.compute_bytes / MIB) > 0.005 * len(logged) + 0.001:
        raise EngineError(
            f"mainline logs a compute buffer of {sum(logged)} MiB, but its structures say "
            f"{memory.total.compute_bytes / MIB:.2f}: this build is not understood"
        )
    cached = [float(x) for x in re.findall(r": size =\s*([\d.]+) MiB \(\s*\d+ cells", log)]
    if cached and abs(sum(cached) - memory.total.context_bytes / MIB) > 0.006 * len(cached) + 0.01:
        raise EngineError(
            f"mainline logs a cache of {sum(cached)} MiB, but its structures say "
            f"{memory.total.context_bytes / MIB:.2f}: this build is not understood"
        )
