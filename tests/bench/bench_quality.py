"""Do designs beat stock files of equal size? (issue 3, criterion 6)

    python tests/bench/bench_quality.py WORKDIR [--measured FILE] [--test FILE]

On the dithered 768-wide SmolLM2: an imatrix from `imatrix.txt`, sensitivities measured on
`probe.txt`, designs at the file sizes of stock IQ3_XXS, IQ3_M and Q4_K_M (never larger), all files
really quantized and scored once on `test.txt`, which nothing was chosen by. Each stock file comes
in two kinds: with the same imatrix, and with that imatrix less its head entry, as published files
are. The KLD that the probes predict for the text is anchored there (`quantmix.anchor`). Ratios of
mean KLD are paired per token; their 95% bound comes from a bootstrap over chunks, since tokens of a
chunk are not independent. Everything is kept in WORKDIR and continued from there.
`--measured` takes an existing results file instead of measuring, `--test` another text to judge by.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from quantmix import anchor, measure, measurements
from quantmix.budget import Budget
from quantmix.demo import build
from quantmix.design import design
from quantmix.engine import binaries
from quantmix.engine.imatrix import collect
from quantmix.engine.perplexity import evaluate
from quantmix.engine.quantize import preflight, quantize
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml.weights import open_weights
from quantmix.loss.measured import MeasuredModel
from quantmix.models.sources import load_model
from quantmix.options import Options
from quantmix.texts import text

# Stock preset: bounds of ours/stock, same imatrix and without head entry (issue 3).
BOUNDS = {"IQ3_XXS": (0.78, 0.72), "IQ3_M": (0.60, 0.56), "Q4_K_M": (0.79, 0.74)}
# Types with coarse and with fine activations, so that both floors are measured.
ROLE_TYPES = ["iq2_ks", "iq3_ks", "iq4_ks", "iq4_k", "iq5_ks", "iq6_k"]
ROLE_TYPES += ["q4_K", "q5_K", "q6_0", "q6_K", "iq3_kt", "iq4_kt"]
BAND_TYPE = "iq3_ks"
BANDS = 6
# Types of the designs: of the default palette, those that are written within a minute here.
PALETTE = (
    "q4_0 q5_0 q8_0 q3_K q4_K q5_K q6_K q6_0 iq4_nl iq4_xs iq2_k iq3_k iq4_k iq5_k iq6_k iq2_ks "
    "iq3_ks iq4_ks iq5_ks iq4_kss iq2_kl iq3_xxs iq3_s iq2_kt iq3_kt iq4_kt"
)


def main() -> None:
    """Run what is missing, print the table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--probe-chunks", type=int, default=8)
    parser.add_argument("--band-chunks", type=int, default=4)
    parser.add_argument("--test-chunks", type=int, default=80)
    parser.add_argument("--types", default=PALETTE.replace(" ", ","), help="palette of the designs")
    parser.add_argument("--measured", type=Path, help="results of `quantmix measure`")
    parser.add_argument("--test", type=Path, default=text("test"), help="text to judge by")
    args = parser.parse_args()
    work: Path = args.workdir
    work.mkdir(parents=True, exist_ok=True)
    base = build("dithered").path
    imatrix, headless = _imatrices(base, work, args.threads)
    measured = args.measured or _measure(base, imatrix, work, args)
    rows = []
    for ftype, bounds in BOUNDS.items():
        stock = _stock(base, imatrix, ftype, work / f"stock-{ftype}.gguf")
        bare = _stock(base, headless, ftype, work / f"bare-{ftype}.gguf")
        ours, predicted = _ours(base, imatrix, measured, stock.stat().st_size, ftype, work, args)
        scored = [_score(p, base, work, args) for p in (ours, stock, bare)]
        row = _row(ftype, bounds, (ours, stock, bare), scored, predicted, args.test_chunks)
        here = _anchored(ours, base, anchor.open_probed(base, measured, imatrix), work, args)
        row["predicted_here"] = here
        row["predicted_here_over_measured"] = here / row["kld"]["ours"]
        rows.append(row)
        print(json.dumps(rows[-1], indent=2), flush=True)
    (work / "quality.json").write_text(json.dumps(rows, indent=2))


def _imatrices(base: Path, work: Path, threads: int | None) -> tuple[Path, Path]:
    """Return the imatrix and a copy without its head entry."""
    full, headless = work / "full.dat", work / "headless.dat"
    if not full.exists():
        collect(base, text("imatrix"), full, chunks=40, threads=threads)
    matrix = imatrices.read(full)
    entries = {n: e for n, e in matrix.entries.items() if n != "token_embd.weight"}
    imatrices.write_dat(imatrices.Imatrix(entries, matrix.dataset, matrix.chunks), headless)
    return full, headless


def _measure(base: Path, imatrix: Path, work: Path, args: Any) -> Path:
    """Measure roles at eight types and depth bands at one; return the results file."""
    weights = open_weights(base)
    groups = measure.groups_of(weights, "role", ROLE_TYPES)
    run = measure.Run(
        base, text("probe"), imatrix, groups, {}, chunks=args.probe_chunks, threads=args.threads
    )
    out = work / "measured.json"
    measure.measure(run, out)
    if args.band_chunks:
        groups = measure.groups_of(weights, "band", [BAND_TYPE], bands=BANDS)
        run = measure.Run(
            base,
            text("probe"),
            imatrix,
            groups,
            {},
            chunks=args.band_chunks,
            threads=args.threads,
        )
        measure.measure(run, out)
    found = measurements.load(out)
    if not found.errors:
        kinds = sorted({*PALETTE.split(), *ROLE_TYPES})
        measure.add_errors(run, found, out, kinds, layers=2)
    return out


def _stock(base: Path, imatrix: Path, ftype: str, out: Path) -> Path:
    """Write a stock file with llama-quantize's own mix."""
    if not out.exists():
        program = binaries.probe("llama-quantize").program.path
        partial = out.with_suffix(".part")
        command = [str(program), "--imatrix", str(imatrix), str(base), str(partial), ftype]
        status, lines = binaries.run(command)
        if status:
            raise binaries.failure(command, status, lines)
        partial.rename(out)
    return out


def _ours(
    base: Path, imatrix: Path, measured: Path, size: int, ftype: str, work: Path, args: Any
) -> tuple[Path, float]:
    """Design at `size` bytes of file, quantize; return the file and the predicted KLD."""
    from quantmix.palette import TypeLimits

    limits = TypeLimits(types=tuple(args.types.split(",")))
    model = load_model(str(base))
    loss = MeasuredModel.of(model, measurements.load(measured))
    budget = Budget.from_size(str(size))
    recipe = design(model, budget, options=Options(limits=limits, measurements=measured))
    out = work / f"ours-{ftype}.gguf"
    recipe_path = work / f"ours-{ftype}.json"
    if not out.exists() or recipe_path.read_text() != "\n".join(recipe.rules):
        out.unlink(missing_ok=True)
        for old in work.glob(f"{out.stem}.*.npy"):
            old.unlink()
        quantize(preflight(recipe, base, out, imatrix=imatrix), threads=args.threads)
        recipe_path.write_text("\n".join(recipe.rules))
    return out, loss.kld(recipe.quality.damage)


def _score(path: Path, base: Path, work: Path, args: Any) -> np.ndarray:
    """Return per-token KLD and −ln p of a file on the test text, shape (2, n); kept beside it."""
    kept = path.with_suffix(f".{args.test.stem}.npy")
    if not kept.exists():
        found = evaluate(
            path,
            args.test,
            base=base,
            logits_base=work / f"{args.test.stem}-base.lp",
            chunks=args.test_chunks,
            threads=args.threads,
        ).per_token
        np.save(kept, np.stack([found.kld, found.nll]))
    return np.asarray(np.load(kept))


def _anchored(
    ours: Path, base: Path, probed: anchor.Probed, work: Path, args: argparse.Namespace
) -> float:
    """Return the KLD that the probes and one anchor predict for a file of ours on the test text."""
    planned = anchor.plan(probed, open_weights(ours).types())
    stored = work / f"{args.test.stem}-base.lp"
    return anchor.predict(
        planned, args.test, stored, chunks=args.test_chunks, threads=args.threads
    ).kld


def _row(
    ftype: str,
    bounds: tuple[float, float],
    files: tuple[Path, ...],
    scored: list[np.ndarray],
    predicted: float,
    chunks: int,
) -> dict[str, Any]:
    ours, stock, bare = (s[0].reshape(chunks, -1).mean(axis=1) for s in scored)
    return {
        "ftype": ftype,
        "bytes": {"ours": files[0].stat().st_size, "stock": files[1].stat().st_size},
        "kld": {"ours": ours.mean(), "stock": stock.mean(), "bare": bare.mean()},
        "ppl": [float(np.exp(s[1].mean())) for s in scored],
        "tokens": scored[0].shape[1],
        "ratio": {"stock": _ratio(ours, stock), "bare": _ratio(ours, bare)},
        "bound": {"stock": bounds[0], "bare": bounds[1]},
        "predicted": predicted,
        "predicted_over_measured": predicted / ours.mean(),
    }


def _ratio(ours: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return the ratio of means with its upper 95% bound, chunks resampled in pairs."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(ours), (4000, len(ours)))
    ratios = ours[picks].mean(axis=1) / other[picks].mean(axis=1)
    return {"ratio": ours.mean() / other.mean(), "upper95": float(np.quantile(ratios, 0.95))}


if __name__ == "__main__":
    main()
