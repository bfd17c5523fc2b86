"""Time the main job, and how the solve grows with tensors × types.

    python tests/bench/bench_design.py [--runs 5]

Prints wall time and CPU time (medians), peak memory of the process, and for 1×, 4× and 16× the
variables of DeepSeek-R1 (layers repeated, budget scaled) the seconds of the solve and its gap.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np

from quantmix.budget import Budget
from quantmix.design import run
from quantmix.models.sources import load_model
from quantmix.options import Options
from quantmix.solve.problem import Problem
from quantmix.solve.solver import Limits, solve


def time_command(runs: int) -> None:
    """Time the whole command in processes of its own."""
    seconds, peak = [], []
    for _ in range(runs + 1):
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            command = ["design", "deepseek-r1", "--vram", "192G", "--json", "--quiet", "--out", out]
            code = (
                "import resource, sys; from quantmix.cli.main import app, _register; _register();"
                f"app({command!r}, standalone_mode=False);"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
            )
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            seconds.append(time.perf_counter() - start)
            peak.append(int(done.stderr.split()[-1]) / 1024)
    print(
        f"design deepseek-r1 --vram 192G: {statistics.median(seconds[1:]):.2f} s "
        f"(median of {runs}, warm), Python process {max(peak):.0f} MiB"
    )


def grown(problem: Problem, times: int, options: int) -> Problem:
    """Return a problem with `times` the groups and `options` the options, slightly perturbed."""
    rng = np.random.default_rng(times * 100 + options)
    cost = np.tile(problem.cost, (times, options))
    use = np.tile(problem.use, (1, times, options))
    noise = rng.uniform(0.97, 1.03, cost.shape)
    return replace(
        problem,
        groups=problem.groups * times,
        cost=cost * noise,
        use=np.round(use * rng.uniform(0.97, 1.03, cost.shape)),
        capacities=problem.capacities * times,
        level=np.tile(problem.level, (times, options)),
    )


def time_growth() -> None:
    """Time the solve alone as the problem grows."""
    model = load_model("deepseek-r1")
    problem = run(model, Budget.from_vram("192G"), Options()).problem
    for times, options in ((1, 1), (4, 1), (2, 2), (16, 1), (4, 4)):
        bigger = grown(problem, times, options)
        start, cpu = time.perf_counter(), time.process_time()
        found = solve(bigger, Limits())
        n = int(np.isfinite(bigger.cost).sum())
        print(
            f"  {times:2d}x tensors, {options}x types: {n:7d} options, "
            f"{time.perf_counter() - start:6.2f} s wall, {time.process_time() - cpu:6.2f} s CPU, "
            f"gap {found.gap:.1e}"
        )


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    time_command(runs)
    time_growth()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"this process: {peak:.0f} MiB at most")


if __name__ == "__main__":
    main()
