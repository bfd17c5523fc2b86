"""The user's own llama-quantize and llama-perplexity: probed, run, output parsed.

Used for GPU runs and models too large for the packaged CPU library. Success is a `Final estimate`
line, never the exit code alone, since a NaN run prints none and still exits 0 (perplexity.cpp).
"""

from __future__ import annotations

import codecs
import io
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantmix.engine.find import Program, find_program
from quantmix.engine.native import EngineId
from quantmix.engine.scores import Divergence, LogRatio, Perplexity
from quantmix.errors import EngineError
from quantmix.ggml.types import Engine

_NUMBER: Final = r"(-?[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|-?nan|-?inf)"
_FINAL: Final = re.compile(rf"Final estimate: PPL.*= *{_NUMBER} \+/- {_NUMBER}")
_CHUNK: Final = re.compile(r"\[(\d+)\]([0-9.]+|-?nan),")
# A row of the table of `--kl-divergence`: chunk, PPL ± error, ...
_ROW: Final = re.compile(r"(?m)^ *(\d+) +([0-9.]+|-?nan) ± ")
_CHUNKS: Final = re.compile(r"(?:calculating perplexity|computing) over (\d+) chunks")
_VERSION: Final = re.compile(r"version: *(\S+) *\((\w+)\)")
_FLAG: Final = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
_COMPLAINT: Final = re.compile(
    r"invalid|error|fail|assert|missing|abort|not supported|cannot|unsupported", re.IGNORECASE
)
_LAST_LINES: Final = 5


@dataclass(frozen=True, slots=True)
class Binary:
    """A probed program: which engine's, its build, the flags its help names."""

    program: Program
    engine: Engine
    build: str
    flags: frozenset[str]

    @property
    def id(self) -> EngineId:
        """The identity its measurements are stored under."""
        return EngineId(self.engine, self.build)


@dataclass(frozen=True, slots=True)
class ParsedRun:
    """What llama-perplexity printed; the last two only with `--kl-divergence`."""

    perplexity: Perplexity
    chunks: int
    divergence: Divergence | None = None
    log_ratio: LogRatio | None = None


def probe(
    name: str, llama_bin: str | Path | None = None, *, engine: Engine | None = None
) -> Binary:
    """Find a program and ask it who it is (`--help`, `--version`).

    Args:
        engine: as in `find_program`, for llama-quantize.

    Raises:
        EngineMissing: it is nowhere, or the named one is not the engine's.
        EngineError: it does not run.
    """
    program = find_program(name, llama_bin, engine=engine)
    text = printed_for(program.path, "--help")
    flags = frozenset(_FLAG.findall(text))
    if not flags:
        raise EngineError(f"{program.path} --help names no flags: is it {name} of llama.cpp?")
    # `--custom-q` (quantize) and `-mla` (all others) are ik's alone.
    whose: Engine = "ik" if flags & {"--custom-q", "-mla", "--mla-use"} else "mainline"
    version = _VERSION.search(printed_for(program.path, "--version"))
    if version:
        build = f"{version.group(1)} ({version.group(2)})"
    else:
        build = program.origin if program.origin == "ik-llama-cpp-python" else "unknown"
    return Binary(program, whose, build, flags)


def run(
    command: Sequence[str], on_line: Callable[[str], None] | None = None
) -> tuple[int, list[str]]:
    """Run a program; feed its merged output to `on_line` as it comes; return (status, lines).

    Progress like `[1]4.5,[2]4.6,` has no line ends, so pieces are split at commas too. The program
    is killed when the caller is interrupted.

    Raises:
        EngineError: the program cannot be started.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as err:
        raise EngineError(f"{command[0]} does not start: {err.strerror}") from err
    lines, pending = [], ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    stdout = process.stdout
    assert isinstance(stdout, io.BufferedReader)
    try:
        while piece := stdout.read1(65536):
            pending += decoder.decode(piece)
            *whole, pending = re.split(r"(?<=\n)|(?<=\],)|(?<=[0-9n],)(?=\[)", pending)
            for line in whole:
                lines.append(line.rstrip("\n"))
                if on_line:
                    on_line(lines[-1])
        pending += decoder.decode(b"", final=True)
        if pending:
            lines.append(pending)
        return process.wait(), lines
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        stdout.close()


def failure(command: Sequence[str], status: int, lines: Sequence[str]) -> EngineError:
    """Return an error with the lines that complain, or else the program's last words."""
    said = [line.strip() for line in lines if line.strip()]
    last = [line for line in said if _COMPLAINT.search(line)][:3] or said[-_LAST_LINES:]
    how = f"died of signal {-status}" if status < 0 else f"exited with {status}"
    return EngineError(f"{Path(command[0]).name} {how}: {' | '.join(last) or 'it printed nothing'}")


def perplexity(
    binary: Binary,
    model: str | Path,
    corpus: str | Path,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    logits_base: str | Path | None = None,
    make_base: bool = False,
    extra: Sequence[str] = (),
    on_chunk: Callable[[int, float], None] | None = None,
) -> ParsedRun:
    """Run llama-perplexity; with `logits_base` against it, with `make_base` to write it.

    Raises:
        EngineError: no final estimate, a NaN, or a failure.
    """
    command = [str(binary.program.path), "-m", str(model), "-f", str(corpus), "-c", str(n_ctx)]
    command += ["--chunks", str(chunks)] if chunks else []
    command += ["-t", str(threads)] if threads else []
    if logits_base:
        command += ["--kl-divergence-base", str(logits_base)]
        command += [] if make_base else ["--kl-divergence"]
    # ik reads escapes in texts and leaves a llama.log in the working folder unless told not to;
    # mainline may move tensors unless told not to.
    command += ["--no-escape"] if binary.engine == "ik" else []
    command += [f for f in ("--log-disable",) if binary.engine == "ik" and f in binary.flags]
    command += ["-fit", "off"] if "-fit" in binary.flags else []
    command += list(extra)

    def watch(line: str) -> None:
        for index, value in _CHUNK.findall(line) + _ROW.findall(line):
            if on_chunk:
                on_chunk(int(index), float(value))

    status, lines = run(command, watch)
    if status:
        raise failure(command, status, lines)
    return parse_perplexity("\n".join(lines), kld=bool(logits_base) and not make_base, n_ctx=n_ctx)


def parse_perplexity(text: str, *, kld: bool = False, n_ctx: int = 512) -> ParsedRun:
    """Read llama-perplexity's output (stdout and stderr together, either engine).

    Raises:
        EngineError: no final line, which is how a NaN run ends.
    """
    if "nan," in text or "negative standard deviation" in text:
        raise EngineError("llama-perplexity answers NaN: a broken quantization or a kernel bug")
    found = _CHUNKS.search(text)
    seen = [int(i) for i, _ in _CHUNK.findall(text) + _ROW.findall(text)]
    chunks = int(found.group(1)) if found else max(seen, default=0)
    tokens = chunks * (n_ctx - 1 - n_ctx // 2)
    if kld:
        return _parse_kld(text, chunks, tokens)
    final = _FINAL.search(text)
    if not final:
        last = " | ".join(text.strip().splitlines()[-_LAST_LINES:])
        raise EngineError(f"llama-perplexity gave no final estimate: {last}")
    return ParsedRun(_ppl(float(final.group(1)), float(final.group(2)), tokens), chunks)


def _ppl(value: float, err: float, tokens: int) -> Perplexity:
    return Perplexity(value, err, math.log(value), tokens)


def _parse_kld(text: str, chunks: int, tokens: int) -> ParsedRun:
    """Read the statistics block of `--kl-divergence`."""

    def value(label: str) -> tuple[float, float]:
        match = re.search(rf"{label} *: *{_NUMBER}(?: *± *{_NUMBER})?", text)
        if not match:
            raise EngineError(f"llama-perplexity printed no {label.replace(' +', ' ')}")
        # A file against itself has rounding noise below zero under the root: its error is nan.
        error = float(match.group(2) or 0.0)
        return float(match.group(1)), 0.0 if math.isnan(error) else error

    mean, err = value(r"Mean +KLD")
    if math.isnan(mean):
        raise EngineError("llama-perplexity answers NaN: a broken quantization or a kernel bug")
    divergence = Divergence(
        mean=mean,
        err=err,
        median=value(r"Median +KLD")[0],
        p90=value(r"90\.0% +KLD")[0],
        p99=value(r"99\.0% +KLD")[0],
        max=value(r"Maximum +KLD")[0],
        same_top=value(r"Same top p")[0] / 100,
    )
    ratio = LogRatio(*value(r"Mean ln\(PPL\(Q\)/PPL\(base\)\)"))
    ppl = _ppl(*value(r"Mean PPL\(Q\)"), tokens)
    return ParsedRun(ppl, chunks, divergence, ratio)


def printed_for(path: Path, flag: str) -> str:
    """Return what a program prints for a flag; exit status is not looked at (ik's help exits 1).

    Raises:
        EngineError: it does not run.
    """
    try:
        done = subprocess.run(
            [str(path), flag],
            capture_output=True,
            timeout=30,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise EngineError(f"{path} {flag} does not run: {err}") from err
    return (done.stdout + done.stderr).decode("utf-8", "replace")
