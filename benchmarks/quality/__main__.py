"""What are the routers worth, at equal steps and equal seeds?

    python -m benchmarks.quality                        # everything, resumable; results in runs/quality
    python -m benchmarks.quality --only "top-2 of 16" --tasks text --seeds 0
    python -m benchmarks.quality --report               # only write docs/results/quality.* from what is there

Every finished cell is one JSON file in the folder of results; cells that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from benchmarks.quality.jobs import result_path, run_job
from benchmarks.quality.report import write_report
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.variants import VARIANTS

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "scikit-learn")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=Path("runs/quality"), help="folder of the cells' results")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the report")
    parser.add_argument("--steps", type=int, help="optimiser steps of every cell (default: the task's own)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS, reverse=True))
    parser.add_argument("--only", nargs="+", choices=sorted(VARIANTS), metavar="VARIANT", help="these variants only")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each with one thread")
    parser.add_argument("--quick", action="store_true", help="24 steps, one seed: whether everything runs (2 minutes)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 24, [0]
    names = list(args.only or VARIANTS)
    failed = [] if args.report else run_all(args, names)
    if failed:
        print(f"{len(failed)} cells failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    found = read(args.results, {task: args.steps or TASKS[task].steps for task in TASKS})
    machine = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        **{name: version(name) for name in PACKAGES},
    }
    for path in write_report(found, args.output, machine=machine):
        print(path)
    return 0


def run_all(args: argparse.Namespace, names: list[str]) -> list[str]:
    """Run what is missing; cells whose weights others continue from come first. Gives the names of failed cells."""
    args.results.mkdir(parents=True, exist_ok=True)
    for continuing in (False, True):
        jobs = [
            (name, task, seed, args.steps or TASKS[task].steps, args.results)
            for seed in args.seeds
            for task in args.tasks
            for name in names
            if bool(VARIANTS[name].resumed_from) is continuing
        ]
        jobs = [job for job in jobs if not result_path(*job).exists()]
        if not jobs:
            continue
        failed, started = [], time.monotonic()
        # Started afresh: a forked child would inherit the threads of whatever was imported here.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            futures = {pool.submit(run_job, *job): job for job in jobs}
            for done, future in enumerate(as_completed(futures), 1):
                name, task, seed, *_ = futures[future]
                error = future.result()
                if error:
                    failed.append(f"{task}/{name}/seed {seed}")
                left_s = (time.monotonic() - started) / done * (len(jobs) - done)
                line = f"{done}/{len(jobs)}  {task:<7} {name:<36} seed {seed}  {error or 'ok'}"
                print(f"{line}  eta {left_s / 60:.0f} min", flush=True)
        if failed:
            return failed
    return []


def read(folder: Path, steps: dict[str, int]) -> list[dict]:
    """The results of these many steps by task, in the order of the variants."""
    paths = [path for task, number in steps.items() for path in sorted(folder.glob(f"{task}-{number}-*.json"))]
    found = [json.loads(path.read_text()) for path in paths]
    order = list(VARIANTS)
    return sorted(
        (result for result in found if result["variant"] in order),
        key=lambda result: (result["task"] != "text", order.index(result["variant"]), result["seed"]),
    )


if __name__ == "__main__":
    sys.exit(main())
