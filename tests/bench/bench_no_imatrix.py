"""What a missing importance matrix costs, type by type, on a real model.

    python tests/bench/bench_no_imatrix.py WORKDIR [--imatrix FILE]

On the dithered 768-wide SmolLM2: every block matrix at one type by hot swap, quantized with an
imatrix from `imatrix.txt` and without, mean KLD over 8 chunks of `probe.txt`. Writes
`no_imatrix_smollm2.csv` into WORKDIR; the fit of the loss model reads it (`quantmix/loss/fit/`).
Types that abort without a matrix are left out. Continued from WORKDIR when interrupted.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from quantmix import measure
from quantmix.demo import build
from quantmix.engine.imatrix import collect
from quantmix.models.sources import load_model
from quantmix.texts import text

TYPES = (
    "q2_K q3_K q4_K q5_K q6_K iq4_nl iq4_xs q4_0 q4_1 q5_0 q5_1 q6_0 iq2_k iq3_k iq4_k iq5_k "
    "iq2_ks iq3_ks iq4_ks iq5_ks iq4_kss iq2_kl iq3_s iq2_s iq3_kt iq4_kt"
)
CHUNKS = 8


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    base = build("dithered").path
    imatrix = args.imatrix or args.workdir / "imatrix.dat"
    if not imatrix.is_file():
        collect(base, text("imatrix"), imatrix, threads=args.threads)
    model = load_model(str(base))
    names = tuple(
        t.name for t in model.tensors if t.quantizable and t.role not in ("token_embd", "output")
    )
    groups = tuple(measure.Group("role", "all", (), t, names) for t in TYPES.split())
    found: dict[str, dict[str, float]] = {}
    for kind, matrix in (("with", imatrix), ("without", None)):
        run = measure.Run(
            base, text("probe"), matrix, groups, {}, chunks=CHUNKS, threads=args.threads
        )
        for probe in measure.measure(run, args.workdir / f"{kind}.json", print).probes:
            found.setdefault(probe.type, {})[kind] = probe.kld
    with (args.workdir / "no_imatrix_smollm2.csv").open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("type", "kld_with", "kld_without"))
        for name in TYPES.split():
            if len(found.get(name, {})) == 2:
                pair = (f"{found[name][k]:.4g}" for k in ("with", "without"))
                writer.writerow((name, *pair))


if __name__ == "__main__":
    main()
