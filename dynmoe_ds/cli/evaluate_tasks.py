"""`dynmoe evaluate --tasks`: benchmarks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from dynmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dynmoe_ds.harness.lm_eval import TaskScores

_OPTIONS = ("limit", "fewshot", "batch_size", "task_folder", "tokenizer", "download")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to the verb's parser."""
    group = parser.add_argument_group(
        "benchmarks of lm-evaluation-harness",
        "With --tasks the model is given those instead of the run's held-out data. RUN may then also be "
        "any causal language model in Hugging Face's format. Needs the extra `eval`.",
    )
    group.add_argument("--tasks", metavar="NAMES", help="tasks or groups, with commas between them; `lm-eval ls tasks`")
    group.add_argument("--limit", type=int, metavar="N", help="the first N examples of each task alone")
    group.add_argument("--fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    group.add_argument("--batch-size", type=int, metavar="N", help="texts computed at once (default: 8)")
    group.add_argument("--task-folder", metavar="DIR", help="YAML files of tasks of your own")
    group.add_argument("--tokenizer", metavar="DIR", help="the tokenizer, if the model's folder has none")
    group.add_argument("--download", action="store_true", default=None, help="fetch data that is not here yet")


def check_options(arguments: argparse.Namespace) -> None:
    """Raises: ConfigError for values that cannot work, and options that belong to --tasks without it."""
    given = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    faults = []
    if arguments.tasks is None:
        faults += [f"--{name.replace('_', '-')} belongs to --tasks." for name in given]
    elif arguments.answers is not None:
        faults.append("--answers belongs to the run's own held-out data. Leave out --tasks, or --answers.")
    for name, least in (("limit", 1), ("fewshot", 0), ("batch_size", 1)):
        if given.get(name, least) < least:
            faults.append(f"--{name.replace('_', '-')} is {given[name]} but must be at least {least}.")
    if faults:
        raise ConfigError(faults)


def run(arguments: argparse.Namespace) -> int:
    """Print the scores. Raises: as `evaluate_tasks`."""
    if not arguments.download:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when Hugging Face's packages are imported, below
    from dynmoe_ds.harness.lm_eval import evaluate_tasks

    scores = evaluate_tasks(
        arguments.run_dir,
        [name for name in arguments.tasks.split(",") if name],
        limit=arguments.limit,
        num_fewshot=arguments.fewshot,
        batch_size=8 if arguments.batch_size is None else arguments.batch_size,
        task_folder=arguments.task_folder,
        tokenizer=arguments.tokenizer,
    )
    if arguments.json:
        print(json.dumps({name: asdict(found) for name, found in scores.items()}, indent=2))
    else:
        print(_table(scores))
    return 0


def _table(scores: Mapping[str, TaskScores]) -> str:
    rows = [("task", "examples", "metric", "score", "stderr", "mean k", "active parameters", "FLOPs per token")]
    for name, found in scores.items():
        cost = found.cost
        for metric, value in found.scores.items():
            stderr = f"{found.stderr[metric]:.4f}" if metric in found.stderr else "-"
            mean_k = "-" if cost.mean_k is None else f"{cost.mean_k:.3f}"
            costs = (mean_k, f"{cost.active_parameters:,.0f}", f"{cost.forward_flops_per_token:,.0f}")
            rows.append((name, f"{found.num_examples}", metric, f"{value:.4f}", stderr, *costs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ("<", ">", "<", ">", ">", ">", ">", ">")
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)).rstrip()
        for row in rows
    )
