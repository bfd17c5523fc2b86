"""Mutate GGUF headers and feed them to the reader: no crash, no hang, no big allocation.

    python tests/bench/fuzz_header.py --runs 200000 [--seed 1] [--file real.gguf]

Every outcome but a Header or a BadFile fails, as does a run of over one second of CPU time or a
peak of over 256 MB. Seeds are a rich header with every value type, a ghost, and optionally the
beginning of a real file.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from quantmix.errors import BadFile
from quantmix.ggml.header import parse
from quantmix.ggml.shards import merge
from quantmix.ggml.types import get
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata
from quantmix.models.from_gguf import model_from_gguf
from quantmix.models.ghost import write_ghost
from quantmix.models.sources import load_model

INTERESTING = [0, 1, 7, 8, 9, 31, 32, 127, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 40]
INTERESTING += [1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8]
LIMIT_SECONDS, LIMIT_BYTES = 1.0, 256 << 20


class Memory:
    """Bytes in memory, claiming to be a file of `size` bytes (a hole after the end)."""

    def __init__(self, data: bytes, size: int) -> None:
        self.name, self.data, self.size = "fuzz", data, size

    def read(self, offset: int, count: int) -> bytes:
        count = min(count, self.size - offset)
        return self.data[offset : offset + count].ljust(count, b"\0")


def seeds(real: Path | None) -> list[bytes]:
    """Headers to start from."""
    kv = encode_metadata(
        {
            "general.architecture": "llama",
            "general.alignment": 64,
            "llama.block_count": 2,
            "llama.attention.head_count_kv": [1, 2],
            "a.string": "some words",
            "a.strings": ["a", "", "longer than the others"],
            "a.floats": [0.5, 1.5],
            "a.bools": [True, False],
            "a.float": 1.0,
            "a.u64": 1 << 40,
            "a.i64": -1,
            "split.no": 0,
            "split.count": 1,
        }
    )
    tensors = [
        NewTensor("token_embd.weight", (256, 8), get("iq2_kt")),
        NewTensor("blk.0.attn_q.weight", (256, 256), get("q4_K")),
        NewTensor("blk.1.ffn_down_exps.weight", (64, 32, 4), get("mxfp4")),
        NewTensor("output_norm.weight", (256,), get("f32")),
    ]
    head, size = encode_header(kv, tensors, 64)
    found = [head + bytes(size)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ghost.gguf"
        write_ghost(path, load_model("smollm2-135m"))
        with path.open("rb") as f:
            found.append(f.read(20_000))
    if real is not None:
        with real.open("rb") as f:
            found.append(f.read(60_000))
    return found


def mutate(rng: random.Random, seed: bytes) -> bytes:
    """Change a few places: bytes, whole numbers, lengths, pieces moved, cut or doubled."""
    raw = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not raw:
            break
        at, kind = rng.randrange(len(raw)), rng.randrange(8)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at : at + 8] = struct.pack("<Q", rng.choice(INTERESTING))
        elif kind == 2:
            raw[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING) & 0xFFFFFFFF)
        elif kind == 3:
            del raw[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            piece = raw[at : at + rng.choice((8, 24, 60))]
            to = rng.randrange(len(raw))
            raw[to:to] = piece
        elif kind == 5:
            raw[8 + 8 * rng.randrange(2) :][:8] = b""
            raw[8:16] = struct.pack("<Q", rng.choice(INTERESTING))
        elif kind == 6:
            raw[at : at + 12] = rng.randbytes(12)
        else:
            del raw[at:]
    return bytes(raw)


def one(raw: bytes, size: int) -> str:
    """Read one mutant as far as a Model; return what came out."""
    try:
        header = parse(Memory(raw, size))
    except BadFile as err:
        return " ".join(str(err).split()[1:4])
    for key in header.metadata:
        header.list_of(key)
    try:
        model_from_gguf(merge((header,), "fuzz"), "fuzz")
    except BadFile:
        return "header read, model refused"
    return "model read"


def main() -> int:
    """Run, print the figures, return 1 on any failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", type=Path)
    args = parser.parse_args()
    rng, bases = random.Random(args.seed), seeds(args.file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcomes: Counter[str] = Counter()
    slowest, failures, start = 0.0, 0, time.perf_counter()
    for run in range(args.runs):
        raw = mutate(rng, rng.choice(bases))
        size = rng.choice((len(raw), len(raw), 1 << 40))
        began = time.process_time()
        try:
            outcomes[one(raw, size)] += 1
        except Exception:
            failures += 1
            Path(f"crash-{args.seed}-{run}.gguf").write_bytes(raw)
            traceback.print_exc()
        slowest = max(slowest, time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f"{args.runs} mutants in {time.perf_counter() - start:.0f} s: {failures} crashes, ")
    print(f"slowest {slowest:.3f} s of CPU, peak memory +{peak / 1e6:.0f} MB")
    for what, count in outcomes.most_common(25):
        print(f"{count:8d}  {what}")
    return int(bool(failures) or slowest > LIMIT_SECONDS or peak > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
