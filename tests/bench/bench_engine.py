"""How much time does measuring take beyond the engine's own forward passes? (issue 3)

    python tests/bench/bench_engine.py [--chunks 8] [--threads N] [--roles OUT.json]

Prints JSON: `verify` = seconds of a whole verification (load, tokenize, score, KLD) over those
inside the engine's decode calls, bound 1.15; `probe` = seconds of a per-tensor probe (quantize,
swap, run, score, restore) over those of a plain scored-nothing forward pass of the same chunks,
median over types, bound 1.25. With `--roles`, the time of the 8 roles × 6 types table, bound 900 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from quantmix import measure
from quantmix.demo import build
from quantmix.engine.hotswap import Quantizer, Swapper
from quantmix.engine.imatrix import collect
from quantmix.engine.perplexity import Evaluator, evaluate, join, read_corpus
from quantmix.engine.session import Session, default_threads
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml.weights import open_weights
from quantmix.texts import text

TYPES = ["iq2_ks", "iq2_kl", "iq3_ks", "iq3_k", "iq4_ks", "iq5_k", "q4_K", "q6_K"]
ROLE_TYPES = ["iq2_ks", "iq3_ks", "iq4_ks", "iq4_k", "iq5_ks", "iq6_k"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--roles", type=Path)
    args = parser.parse_args()
    base = build("dithered").path
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "i.dat"
        collect(base, text("imatrix"), matrix, chunks=4, threads=args.threads)
        found = {"verify": _verify(base, args), "probe": _probe(base, matrix, args)}
        if args.roles:
            found["roles"] = _roles(base, matrix, args)
    print(json.dumps(found, indent=2))


def _verify(base: Path, args: Any) -> dict[str, float]:
    plain = evaluate(base, text("probe"), chunks=args.chunks, threads=args.threads)
    kld = evaluate(base, text("probe"), base=base, chunks=args.chunks, threads=args.threads)
    return {
        "ppl": plain.seconds / plain.forward_seconds,
        "kld_side_by_side": kld.seconds / kld.forward_seconds,
        "forward_seconds_per_chunk": plain.forward_seconds / args.chunks,
    }


def _probe(base: Path, matrix: Path, args: Any) -> dict[str, Any]:
    weights = open_weights(base)
    quantizer = Quantizer(weights, imatrices.read(matrix), args.threads)
    with Session(base, threads=args.threads, mmap=False, reuse=False) as session:
        swapper = Swapper(session, weights, quantizer)
        runner = Evaluator(session, args.threads)
        tokens = session.tokenize(read_corpus(text("probe")).text)
        chunks = session.chunks(tokens, args.chunks)
        rows = [runner.encode(c) for c in chunks]
        ratios = {}
        for kind in TYPES:
            for name in ("blk.4.ffn_down.weight", "blk.20.attn_q.weight"):
                before = runner.forward_seconds
                for c in chunks:  # the plain pass, right before: the machine may be shared
                    runner.encode(c)
                forward = runner.forward_seconds - before
                started = time.perf_counter()
                swapper.set_mix({name: kind})
                join([runner.score(c, b) for c, b in zip(chunks, rows, strict=True)])
                swapper.set_mix({})
                ratios[f"{name} {kind}"] = (time.perf_counter() - started) / forward
    return {"median": statistics.median(ratios.values()), "all": ratios}


def _roles(base: Path, matrix: Path, args: Any) -> dict[str, float]:
    groups = measure.groups_of(open_weights(base), "role", ROLE_TYPES)
    run = measure.Run(
        base, text("probe"), matrix, groups, {}, chunks=args.chunks, threads=args.threads
    )
    started = time.perf_counter()
    measure.measure(run, args.roles)
    return {"probes": len(groups), "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
