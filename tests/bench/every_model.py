"""Design and check every model of the catalog at three sizes, on both engines; print the table.

    python tests/bench/every_model.py [--engine ik] [--engine mainline] [MODEL …] [--out FILE.md]

Each design's rules are matched back and walked by the real quantizer on a ghost; `ok` means that
no tensor's type, bytes or printed size differs. A refusal shows the engine's own last words. Where
a size is below what the rows of a model allow, the smallest that works is used instead (`≥`).
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantmix.budget import Budget
from quantmix.design import run
from quantmix.engine.ghost import check
from quantmix.errors import EngineError, InfeasibleBudget, QuantmixError
from quantmix.models.catalog import catalog
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.options import Options

SIZES = ("3.0bpw", "4.5bpw", "6.0bpw")
ENGINES = ("ik", "mainline")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model on one engine."""

    model: str
    engine: str
    cells: tuple[str, ...]
    ok: bool
    seconds: float
    said: str = ""


def one(model: Model, engine: str) -> Outcome:
    """Design and check at all sizes; stop at the engine's refusal."""
    cells: list[str] = []
    started = time.perf_counter()
    for size in SIZES:
        try:
            cells.append(_cell(model, engine, size))
        except EngineError as err:
            return Outcome(model.id, engine, (), False, time.perf_counter() - started, str(err))
        except QuantmixError as err:
            cells.append(f"failed: {err}")
    ok = all(c.startswith(("ok", "≥")) for c in cells)
    return Outcome(model.id, engine, tuple(cells), ok, time.perf_counter() - started)


def _cell(model: Model, engine: str, size: str) -> str:
    mark = "ok"
    try:
        design = run(model, Budget.from_size(size, engine=engine), Options())
    except InfeasibleBudget as err:
        smallest = re.search(r"--size (\S+)", str(err))
        if smallest is None:
            raise
        mark = f"≥ {smallest[1]} ok"
        design = run(model, Budget.from_size(smallest[1], engine=engine), Options())
    found = check(design.recipe, model)
    return mark if found.ok else found.complaint


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield the lines of a Markdown table and the counts per engine."""
    yield "| model | engine | " + " | ".join(SIZES) + " | seconds |"
    yield "|---|---|" + "---|" * len(SIZES) + "---:|"
    for o in outcomes:
        cells = o.cells or (f"refused: {o.said[-160:]}",) + ("",) * (len(SIZES) - 1)
        cells = tuple(c.replace("|", "\\|").replace("\n", " ") for c in cells)
        yield f"| {o.model} | {o.engine} | " + " | ".join(cells) + f" | {o.seconds:.1f} |"
    yield ""
    for engine in dict.fromkeys(o.engine for o in outcomes):
        mine = [o for o in outcomes if o.engine == engine]
        yield f"{engine}: {sum(o.ok for o in mine)} of {len(mine)} models at all three sizes."


def main() -> int:
    """Print the table; return 1 when a design that the engine walks does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    outcomes = []
    for name in args.models or list(catalog()):
        for engine in args.engine or ENGINES:
            outcome = one(load_model(name), engine)
            outcomes.append(outcome)
            print(f"{outcome.model} {engine}: {outcome.cells or outcome.said}", file=sys.stderr)
    text = "\n".join(table(outcomes)) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text("# Every model, both engines\n\n" + text, encoding="utf-8")
    return int(any(not o.ok and o.cells for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
