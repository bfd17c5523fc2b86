"""What batch promises, measured: bench_batch.py [--designs | --kills N | --costs]

--designs  300 designs of DeepSeek-R1 over budgets, figures and all: at most 5 minutes on 2 cores
--kills N  N runs killed (-9, the whole group) at random moments, each finished by a rerun: outputs
           byte-identical to an undisturbed run, nothing partial seen, nothing finished run twice
--costs    seconds per unit of work of every step, written to quantmix/batch/costs.csv
"""

from __future__ import annotations

import argparse
import csv
import random
import resource
import sys
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from batch import runs

DESIGNS, MINUTES = 300, 5.0

COSTS = """
[[job]]
model = "deepseek-r1"
budgets = ["--vram 192G", "--vram 256G", "--gpus 2x96G --ram 256G"]

[[job]]
model = "models/demo.gguf"
imatrix = "models/demo.dat"
budgets = ["--size 4.5bpw"]
steps = ["design", "check", "quantize", "verify", "report"]
chunks = 4
db = "measured.db"
"""


def designs(folder: Path) -> bool:
    """Time 300 designs in a batch of two workers, from an empty folder."""
    low, high = 140, 440
    step = (high - low) / DESIGNS
    budgets = ", ".join(f'"--vram {low + i * step:.0f}G"' for i in range(DESIGNS))
    text = f'[[job]]\nmodel = "deepseek-r1"\nbudgets = [{budgets}]\nsteps = ["design"]\n'
    runs.new_folder(folder / "designs", text)
    first = runs.batch(folder / "designs", "--jobs", "2", "--quiet")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = runs.batch(folder / "designs", "--jobs", "2", "--quiet")
    count = runs.statuses(first.document)
    ok = count["ran"] == DESIGNS and first.seconds <= 60 * MINUTES and again.seconds <= 3.0
    print(
        f"{count['ran']} designs of DeepSeek-R1 with figures: {first.seconds:.1f} s on 2 workers "
        f"({first.seconds / DESIGNS:.2f} s each), {used.ru_utime + used.ru_stime:.0f} s of CPU; "
        f"rerun with nothing to do: {again.seconds:.2f} s"
    )
    return ok


def kills(folder: Path, n: int, seed: int) -> bool:
    """Kill n runs at random moments and finish each; print what differs."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    models = runs.write_models(folder / "store")
    plain = runs.new_folder(folder / "undisturbed", runs.REAL, models)
    undisturbed = runs.batch(plain, "--jobs", "2")
    wanted = runs.tree(plain / "recipes")
    good = undisturbed.code == 0
    interrupted = 0
    for i in range(n):
        place = runs.new_folder(folder / f"kill-{i}", runs.REAL, models)
        moment = rng.uniform(0.3, undisturbed.seconds)
        alive = runs.kill_after(place, moment, "--jobs", "2")
        out = place / "recipes"
        seen = runs.partial(out) if out.exists() else []
        before = sum(runs.finished(out).values()) if (out / ".quantmix/batch.db").exists() else 0
        last = runs.batch(place, "--jobs", "2")
        found = runs.tree(out)
        differing = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        twice = runs.started_again(out)
        ok = not seen and not differing and not twice and last.code == 0
        good &= ok
        interrupted += alive
        print(
            f"{i + 1:3} killed at {moment:5.2f} s{'' if alive else ' (had ended)'}, {before} steps "
            f"finished before; partial {seen}, differing {differing}, twice {twice}: "
            f"{'ok' if ok else 'NOT OK'}",
            flush=True,
        )
    print(f"{n} runs, {interrupted} killed while running, {len(wanted)} files compared: {good}")
    return good


def costs(folder: Path) -> bool:
    """Measure every step and write the table."""
    from quantmix.batch import estimate, state
    from quantmix.batch.pipeline import load
    from quantmix.batch.run import open_batch
    from quantmix.demo import build
    from quantmix.engine.imatrix import collect
    from quantmix.texts import text

    models = folder / "models"
    models.mkdir()
    build("dithered", models / "demo.gguf")
    collect(models / "demo.gguf", text("imatrix"), models / "demo.dat", chunks=4)
    (folder / "pipeline.toml").write_text(COSTS)
    done = runs.batch(folder)
    print(done.errors)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    with open_batch(load(folder / "pipeline.toml")) as batch:
        for item in batch.items:
            for step in item.steps:
                last = batch.state.step(item.name, step)
                assert isinstance(last, state.Done)
                sums[step][0] += last.seconds
                sums[step][1] += estimate.units(item, step, batch.pipeline.folder)
    names = {"quantize": "weights", "verify": "weights x tokens"}
    source = f"tests/bench/bench_batch.py --costs, 2 cores, {datetime.now(UTC):%Y-%m-%d}"
    target = Path(estimate.__file__).with_name("costs.csv")
    with target.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("step", "unit", "seconds_per_unit", "source"))
        for step, (seconds, work) in sums.items():
            rows.writerow((step, names.get(step, "tensors"), f"{seconds / work:.3g}", source))
    print(target.read_text())
    return done.code == 0


def main() -> int:
    """Run what is asked for, all but --costs by default; return 0 when all promises hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--designs", action="store_true")
    parser.add_argument("--kills", type=int, metavar="N")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    asked = parser.parse_args()
    everything = not (asked.designs or asked.kills or asked.costs)
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        if asked.kills or everything:
            good &= kills(Path(scratch), asked.kills or 20, asked.seed)
        if asked.designs or everything:
            good &= designs(Path(scratch))
        if asked.costs:
            good &= costs(Path(scratch))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
