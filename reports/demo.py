"""Measure the demo model at eight sizes, ours against stock: `python reports/demo.py [--work DIR]`.

Every stock preset is quantized as people do it, then a recipe is designed for exactly its bytes,
quantized with the same importance matrix, and both are measured on the same text against the same
base. Files stay in the work folder, so that a run that was stopped goes on where it was; the page,
the plot and the measured rows go to reports/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantmix import demo
from quantmix.assemble import header_allowance
from quantmix.engine import binaries
from quantmix.engine.imatrix import collect
from quantmix.engine.quantize import preflight, quantize
from quantmix.files import cache_folder, write_text
from quantmix.ggml.weights import open_weights
from quantmix.models.sources import load_model
from quantmix.recipe import Recipe
from quantmix.report import data, figures, pages
from quantmix.report.data import Subject, frontier_for
from quantmix.request import Request, fulfil
from quantmix.store import Store
from quantmix.texts import text
from quantmix.verify import Target, verify

HERE = Path(__file__).parent
CREATED = "2026-11-25T00:00:00Z"
STOCK = ("IQ2_XS", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
CHUNKS = 20


def stock_file(preset: str, source: Path, imatrix: Path, work: Path) -> Path:
    """Quantize with a preset as it is, unless done."""
    out = work / f"stock-{preset}.gguf"
    if not out.exists():
        binary = binaries.probe("llama-quantize")
        made = out.with_suffix(".part")
        files = ["--imatrix", str(imatrix), str(source), str(made), preset]
        command = [str(binary.program.path), *binary.program.prefix, *files]
        status, lines = binaries.run(command)
        if status:
            raise binaries.failure(command, status, lines)
        made.rename(out)
    return out


def our_file(
    preset: str, n_bytes: int, source: Path, imatrix: Path, work: Path
) -> tuple[Path, Recipe]:
    """Design for the tensor bytes of a preset and quantize, unless done."""
    model = load_model(str(source))
    size = f"{n_bytes + header_allowance(model)}"
    request = Request(str(source), size=size, out=work, name=f"ours-{preset}", no_check=True)
    answer = fulfil(request, model=model)
    recipe = replace(answer.recipe, created=CREATED)
    out = work / f"ours-{preset}.gguf"
    if out.exists() and open_weights(out).types() == {t.name: t.type for t in recipe.tensors}:
        return out, recipe
    return quantize(preflight(recipe, source, out, imatrix=imatrix)).path, recipe


def measured(target: Target, source: Path, work: Path, chunks: int) -> None:
    """Measure one file, unless it was measured already."""
    data_id = open_weights(target.file).data_fingerprint
    db = work / "measurements.db"
    with Store(db) as store:
        if any(m.chunks == chunks for m in store.find(data=data_id)):
            return
    found = verify(target, text("test"), base=source, logits_base=work / "base.logits",
                   chunks=chunks, db=db)  # fmt: skip
    kld = found.evaluation.divergence
    print(f"{target.file.name}: PPL {found.evaluation.perplexity.ppl:.4f}, KLD {kld and kld.mean}")


def run(work: Path, presets: Sequence[str], chunks: int) -> list[Recipe]:
    """Make and measure everything; return the recipes."""
    work.mkdir(parents=True, exist_ok=True)
    source, imatrix = work / "smollm2-demo.gguf", work / "smollm2-demo.dat"
    if not source.exists():
        demo.build(out=source)
    if not imatrix.exists():
        collect(source, text("imatrix"), imatrix)
    recipes = []
    for preset in presets:
        stock = stock_file(preset, source, imatrix, work)
        n_bytes = sum(info.n_bytes for info, _, _ in open_weights(stock).tensors.values())
        ours, recipe = our_file(preset, n_bytes, source, imatrix, work)
        recipes.append(recipe)
        measured(Target(stock, None), source, work, chunks)
        measured(Target(ours, recipe), source, work, chunks)
    return recipes


def verdicts(section: dict[str, Any]) -> list[dict[str, Any]]:
    """Return per preset both measurements and whether ours is the better by KLD and by PPL."""
    rows = {m["label"]: m for m in section["measured"]}
    out = []
    for preset in STOCK:
        ours, stock = rows.get(f"ours-{preset}"), rows.get(f"stock-{preset}")
        if ours and stock:
            out.append(
                {
                    "preset": preset,
                    "stock_bytes": stock["tensor_bytes"],
                    "our_bytes": ours["tensor_bytes"],
                    "stock_kld": stock["kld"],
                    "our_kld": ours["kld"],
                    "stock_ppl": stock["ppl"],
                    "our_ppl": ours["ppl"],
                    "kld_lower": ours["kld"] < stock["kld"],
                    "ppl_lower": ours["ppl"] < stock["ppl"],
                }
            )
    return out


def main() -> None:
    """Run, then write page, plot and rows."""
    parser = argparse.ArgumentParser(description="Measure the demo model, ours against stock.")
    parser.add_argument("--work", type=Path, default=cache_folder() / "sweep")
    parser.add_argument("--into", type=Path, default=HERE)
    parser.add_argument("--presets", default=",".join(STOCK))
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    asked = parser.parse_args()
    recipes = run(asked.work, asked.presets.split(","), asked.chunks)
    with Store(asked.work / "measurements.db") as store:
        rows = tuple(m for m in store.find() if m.chunks == asked.chunks)
    model = load_model(str(asked.work / "smollm2-demo.gguf"))
    subject = Subject(model, frontier_for(model, recipes, rows), tuple(recipes), rows)
    document = data.sweep_document([subject])
    section = document["sections"][0]
    asked.into.mkdir(parents=True, exist_ok=True)
    write_text(asked.into / "smollm2-demo.html", pages.sweep_page(document))
    figures.save_curve(section, asked.into / "smollm2-demo.png")
    compared = verdicts(section)
    write_text(asked.into / "smollm2-demo.json", json.dumps(compared, indent=1) + "\n")
    better = sum(r["kld_lower"] for r in compared)
    print(f"ours has the lower KLD at {better} of {len(compared)} sizes")


if __name__ == "__main__":
    main()
