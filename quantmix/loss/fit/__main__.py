"""`python -m quantmix.loss.fit --tables DIR --measurements CSV [--out DIR]`.

Writes curve.csv, no_imatrix.csv, sensitivity.csv, published.csv, base_ppl.csv and params.json. The
same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from quantmix.loss import evidence, prior
from quantmix.loss.fit import command, curate, curve, hyper, no_imatrix, sensitivity, tables


def main(argv: Sequence[str] | None = None) -> None:
    """Refit everything and write the parameter files to `--out`."""
    parser = argparse.ArgumentParser(prog="python -m quantmix.loss.fit", description=__doc__)
    parser.add_argument("--tables", type=Path, required=True, help="folder of raw tables")
    parser.add_argument("--measurements", type=Path, required=True, help="CSV of measurements")
    parser.add_argument("--out", type=Path, default=Path(prior.__file__).parent)
    args = parser.parse_args(argv)
    refit(args.tables, args.measurements, args.out)


def refit(raw: Path, measurements: Path, out: Path) -> None:
    """Fit from `raw` and `measurements`, write the parameter files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [*evidence.raw_rows(measurements), *curate.more()]
    sweeps = tables.sweeps(raw, rows)
    fitted = curve.fit_curve(sweeps, sensitivity.anchors(tables.kld_tables(raw), sweeps))
    _write(out / "curve.csv", ("type", "gain", "sd", "n_models", "source"), _curve_rows(fitted))
    without = no_imatrix.fit(no_imatrix.pairs(rows, fitted))
    _write(out / "no_imatrix.csv", no_imatrix.COLUMNS, without)
    sens = sensitivity.fit_sensitivity(tables.ppl_tables(raw))
    columns = ("family", "role", "share", "slope", "bend", "first", "last", "n_tables", "source")
    _write(out / "sensitivity.csv", columns, _sensitivity_rows(sens))
    shipped = curate.curate(rows)
    _write(out / "published.csv", curate.COLUMNS, shipped)
    bases = curate.base_rows(shipped)
    _write(out / "base_ppl.csv", ("model", "ppl", "corpus", "n_ctx", "source"), bases)
    doc = hyper.fit_hyper(fitted, curate.curate(rows, corpus=curate.PART), raw)
    text = json.dumps(doc, indent=2, sort_keys=True) + "\n"
    (out / "params.json").write_text(text, encoding="utf-8")


def _curve_rows(f: curve.CurveFit) -> list[dict[str, str]]:
    return [
        {
            "type": name,
            "gain": _digits(math.exp(ln_gain)),
            "sd": _digits(f.sd[name], 2),
            "n_models": str(f.n_models[name]),
            "source": tables.CREDIT,
        }
        for name, ln_gain in sorted(f.ln_gain.items(), key=lambda x: (x[1], x[0]))
    ]


def _sensitivity_rows(f: sensitivity.SensitivityFit) -> list[dict[str, str]]:
    out = []
    for (family, role), share in sorted(f.share.items()):
        shape = f.shape[family, prior.role_class(role)]
        out.append(
            {
                "family": family,
                "role": role,
                "share": _digits(share, 3),
                "slope": f"{shape.slope:.2f}",
                "bend": f"{shape.bend:.2f}",
                "first": f"{shape.first:.2f}",
                "last": f"{shape.last:.2f}",
                "n_tables": str(f.n_tables.get(family, sum(f.n_tables.values()))),
                "source": tables.CREDIT,
            }
        )
    return out


def _digits(value: float, n: int = 3) -> str:
    """Return `value` with n significant digits: more would not be the same on every machine."""
    return f"{value:.{n}g}"


def _write(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    file.write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    command(main)
