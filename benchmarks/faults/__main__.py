"""Does a run that is killed end as one that was left alone?

    python -m benchmarks.faults            # about 40 kills in 13 runs, on 2 ranks; about 20 minutes on 2 cores

Every run is `dynmoe train` on two ranks with expert parallelism, an elastic pool and checkpoints in the background. A
rank, its launcher or the command is killed at a random moment, then the same command is started again. At the end the
losses, the plans and the model are compared with those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.faults.campaign import COMMAND, STEPS, differences, finish, read_lines, run_and_kill
from benchmarks.faults.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=13)
    parser.add_argument("--kills", type=int, default=3, help="kills of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="folder of the runs, made anew")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the report")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    undisturbed = args.folder.absolute() / "undisturbed"
    finish(undisturbed)
    logged = [line["time_s"] for line in read_lines(undisturbed / "metrics.jsonl")]
    training_s = logged[-1] - logged[0]
    print(f"undisturbed: {training_s:.1f} s of training", flush=True)

    draw, began, kills, results = random.Random(args.seed), time.monotonic(), [], []
    for number in range(1, args.runs + 1):
        folder = args.folder.absolute() / f"run-{number:02d}"
        of_run = []
        for kill in run_and_kill(folder, number, args.kills, training_s, draw):
            of_run.append(kill)
            print(kill, flush=True)
        different = differences(folder, undisturbed)
        print(f"run {number}: {', '.join(different) or 'equal'}", flush=True)
        results.append({"run": number, "kills": len(of_run), "differences": different})
        kills += [asdict(kill) for kill in of_run]
    found = {
        "command": ["dynmoe", "train", *COMMAND],
        "seed": args.seed,
        "machine": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
        "minutes": round((time.monotonic() - began) / 60, 1),
        "steps": STEPS,
        "events": len(read_lines(undisturbed / "adaptation.jsonl")),
        "runs": results,
        "kills": kills,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "faults.json").write_text(json.dumps(found, indent=1) + "\n")
    write_report(found, args.output / "faults.md")
    is_equal = not any(result["differences"] for result in results)
    return 0 if is_equal and not any(kill["left_behind"] for kill in kills) else 1


if __name__ == "__main__":
    sys.exit(main())
