"""How does a training step's cost grow, and can a model fitted on one and two ranks predict four?

    python -m benchmarks.scale            # measures and fits: docs/results/scale.*, configs/cluster/local_cpu.yaml
    python -m benchmarks.scale --report   # only fits and writes again, from the measurements that are there

Decoders of several sizes are trained on 1, 2 and 4 gloo ranks, one thread each. The ranks of a number of ranks are
started `--passes` times, in turn; within a pass the steps of all cases are interleaved, and the least time counts. Ends
within `--limit-s`: what is not measured by then is left out, the first pass excepted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.scale.design import Case, design, quick_design
from benchmarks.scale.measure import Measured, RanksFailed, measure_pass
from benchmarks.scale.report import write_report

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="steps of every case and pass")
    parser.add_argument("--passes", type=int, default=2, help="how often ranks are started for all cases")
    parser.add_argument("--limit-s", type=float, default=540.0, help="after which nothing new is started")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results", help="folder of the report")
    parser.add_argument("--cluster", type=Path, default=ROOT / "configs/cluster/local_cpu.yaml", help="the fitted file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on one and two ranks: whether everything runs")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args(arguments)
    cases = quick_design() if args.quick else design()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "scale.json"
    if not args.report:
        try:
            path.write_text(json.dumps(measure(args, cases), indent=1) + "\n")
        except RanksFailed as error:
            print(error, file=sys.stderr)
            return 1
    for written in write_report(json.loads(path.read_text()), cases, args.output, args.cluster):
        print(written)
    return 0


def measure(args: argparse.Namespace, cases: Sequence[Case]) -> dict[str, object]:
    """What was measured, for `scale.json`: by case, in the order of the design."""
    began, load = time.monotonic(), os.getloadavg()[0]
    found = {case: Measured() for case in cases}
    finished = 0
    for number in range(args.passes):
        for num_ranks in sorted({case.num_ranks for case in cases}):
            left_s = args.limit_s - (time.monotonic() - began)
            # A later pass takes as long as the first at most; it is not begun where it might not end.
            if number > 0 and left_s < (time.monotonic() - began) / max(finished, 1) * 1.2:
                print(f"pass {number + 1} on {num_ranks} ranks is left out: {left_s:.0f} s left", flush=True)
                continue
            chosen = [case for case in cases if case.num_ranks == num_ranks]
            start = time.monotonic()
            try:
                results = measure_pass(chosen, num_ranks, args.rounds, memory=number == 0, timeout_s=max(left_s, 240.0))
            except RanksFailed as error:
                if number == 0:
                    raise
                print(f"pass {number + 1} on {num_ranks} ranks is left out: {error}", file=sys.stderr, flush=True)
                continue
            finished += 1
            for case, result in zip(chosen, results, strict=True):
                whole = found[case]
                whole.times += result.times
                whole.peak_bytes = max(whole.peak_bytes, result.peak_bytes)
                whole.sent_bytes, whole.mean_k = result.sent_bytes, result.mean_k
            print(f"pass {number + 1}, {num_ranks} ranks: {time.monotonic() - start:.0f} s", flush=True)
    return {
        "machine": {
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "load_before": round(load, 1),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
        "command": " ".join(["python -m benchmarks.scale", *(["--quick"] if args.quick else [])]),
        "rounds": args.rounds,
        "passes": args.passes,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "cases": [
            {
                "name": case.name,
                "role": case.role,
                "step_s": min(result.times),
                "all_s": [round(seconds, 5) for seconds in result.times],
                "peak_bytes": result.peak_bytes,
                "dispatch_bytes": result.sent_bytes,
                "mean_k": round(result.mean_k, 3),
            }
            for case, result in found.items()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
