"""What the papers' tables say of a run, for every run folder given: `python benchmarks/recipe_table.py runs/mrpc/*`.

Prints a Markdown table: the router, live experts of all slots, the best held-out metric with its step, and mean k and
active parameters per token at the end of training. The best evaluation is chosen on the data that it is reported for,
as the papers' public code does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dynmoe_ds.telemetry import read_metrics
from dynmoe_ds.telemetry.run_folder import CONFIG_FILE

METRICS = ("eval/score", "eval/accuracy")
HEADER = ("run", "router", "experts", "metric", "best", "at step", "mean k", "active parameters")


def row(run_dir: Path) -> tuple[str, ...]:
    """One run's row of HEADER; the first of METRICS that the run has counts."""
    lines = read_metrics(run_dir)
    metric = next((name for name in METRICS if any(name in line for line in lines)), None)
    if metric is None:
        raise SystemExit(f"{run_dir} has none of {', '.join(METRICS)}. Give folders of classification runs.")
    config = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    best = max((line for line in lines if line.get(metric) is not None), key=lambda line: line[metric])
    last = lines[-1]
    live = [round(value) for name, value in sorted(last.items()) if name.startswith("moe/live_experts/")]
    return (
        run_dir.name,
        _router(config["router"]),
        f"{', '.join(map(str, live))} of {config['model']['num_slots']}",
        metric.removeprefix("eval/"),
        f"{100 * best[metric]:.2f}",
        str(best["step"]),
        f"{last['moe/mean_k']:.2f}",
        f"{last['moe/active_parameters'] / 1e6:.1f}M",
    )


def table(run_dirs: Sequence[Path]) -> str:
    """The Markdown table of all runs."""
    rows = [HEADER, ("---",) * len(HEADER), *(row(run_dir) for run_dir in run_dirs)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _router(config: dict[str, Any]) -> str:
    return f"{config['name']}, k={config['k']}" if config["name"] == "top_k" else config["name"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, help="folders of runs")
    print(table(parser.parse_args().run_dirs), end="")
