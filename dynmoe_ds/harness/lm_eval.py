"""Benchmarks of lm-evaluation-harness, with what their tokens cost beside every score.

`dynmoe evaluate FOLDER --tasks arc_easy` runs them. The harness's own command knows the model as `dynmoe`:

    python -m dynmoe_ds.harness.lm_eval run --model dynmoe --model_args path=FOLDER --tasks arc_easy
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe_ds.errors import ConfigError, DataError, DynMoEError

if TYPE_CHECKING:
    from dynmoe_ds.harness.harness_model import Cost

PACKAGES = ("lm_eval", "accelerate")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScores:
    """What the harness says of a task, or of a group of tasks.

    scores: by metric, such as `acc`, or `exact_match,strict-match` where a filter comes before the metric. stderr: of
    those that have one. num_fewshot: None for a group whose tasks differ. cost: of the task's tokens, or of all of the
    group's.
    """

    scores: dict[str, float]
    stderr: dict[str, float]
    num_examples: int
    num_fewshot: int | None
    cost: Cost


def evaluate_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    task_folder: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, TaskScores]:
    """The scores of the model in `folder` (as for `HarnessModel`) by task, and by group of tasks, in one process.

    tasks: names of tasks, groups and tags of the harness, or patterns such as `arc_*`. limit: the first examples of
    each task alone. num_fewshot: examples in the prompt; None leaves them to the task. task_folder: YAML files of
    further tasks, which come before the harness's. tokenizer: its folder, where `folder` has none.

    A vision-language model is asked in text alone. Data that the harness does not find on this machine are downloaded
    by it, unless HF_HUB_OFFLINE is set in the environment.

    Raises: ConfigError without the extra `eval`, for names that no task has and tasks that this cannot run; DataError
    for tasks whose data cannot be loaded, and, as CheckpointError, for a folder that cannot be used.
    """
    require_lm_eval()
    from lm_eval.evaluator import simple_evaluate

    from dynmoe_ds.harness.harness_model import HarnessModel
    from dynmoe_ds.harness.model_folder import check_model_folder

    check_model_folder(Path(folder))
    manager, names = _find(tasks, task_folder)
    loaded = [task for name in names for task in _load(manager, name)]
    _check_once(loaded)
    model = HarnessModel(folder, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found: Any = simple_evaluate(
            model, tasks=loaded, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    except ValueError as error:
        if not num_fewshot:
            raise
        raise ConfigError(
            f"With {num_fewshot} examples in the prompt: {error}. A task may have fewer to show; ask for fewer."
        ) from error
    of_group = {name: _tasks_of(name, found["group_subtasks"]) for name in found["results"]}
    return {
        name: TaskScores(
            scores=_numbers(values, is_stderr=False),
            stderr=_numbers(values, is_stderr=True),
            num_examples=sum(found["n-samples"][task]["effective"] for task in of_group[name]),
            num_fewshot=found["n-shot"].get(name),
            cost=model.cost(of_group[name]),
        )
        for name, values in found["results"].items()
        if _numbers(values, is_stderr=False)  # a group may have tasks alone
    }


def require_lm_eval() -> None:
    """Raises: ConfigError where the harness, or what its model needs, is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"Tasks of lm-evaluation-harness need {' and '.join(missing)}, which is not installed. Install the extra: "
            "pip install 'dynmoe-ds[eval]'."
        )


def _find(tasks: Sequence[str], task_folder: str | Path | None) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and the names in it that `tasks` mean."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise ConfigError("No task is named. Name some of lm-evaluation-harness, such as arc_easy.")
    if task_folder is not None:
        if not Path(task_folder).is_dir():
            raise ConfigError(f"There is no folder {task_folder} (seen from {Path.cwd()}). Name one with YAML files.")
        # Without the harness's own thousands of tasks, which take half a minute to read.
        manager = TaskManager(include_path=f"{task_folder}", include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):
            return manager, list(tasks)
    manager = TaskManager(include_path=None if task_folder is None else f"{task_folder}")
    names = []
    for task in tasks:
        matched = manager.match_tasks([task])
        if not matched:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            meant = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
            raise ConfigError(f"lm-evaluation-harness has no task {task!r}. {meant}")
        names += matched
    return manager, list(dict.fromkeys(names))


def _load(manager: Any, name: str) -> list[Any]:
    """The tasks or the group of this name, with their data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # the libraries raise whatever the first file that is missing or wrong leads to
        first = f"{error}".strip().partition("\n")[0]
        raise DataError(
            f"The task {name} cannot be loaded ({type(error).__name__}: {first}). If its data are not on this machine "
            "yet, `dynmoe evaluate --download` fetches them where there is a network."
        ) from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"The task {task_name} shows images; models are asked in text alone here. Leave it out.")
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"The task {task_name} runs code that the model writes. Only the harness's own command does so, with "
                "--confirm_run_unsafe_code: python -m dynmoe_ds.harness.lm_eval run --model dynmoe ..."
            )
    inside = {task for group in loaded["groups"].values() for task in group.get_all_tasks()}
    subgroups = {child for children in loaded["group_map"].values() for child in children}
    groups = [group for group_name, group in loaded["groups"].items() if group_name not in subgroups]
    return [*groups, *(task for task in loaded["tasks"].values() if task not in inside)]


def _check_once(loaded: Sequence[Any]) -> None:
    """Raises: ConfigError for a task that is asked for more than once, say by itself and in its group."""
    names = [
        task.task_name for one in loaded for task in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])
    ]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{twice[0]} is asked for more than once, by itself or in a group of tasks. Name it once.")


def _tasks_of(name: str, children: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, of its groups too; a task by itself."""
    return [task for child in children.get(name, []) for task in _tasks_of(child, children)] or [name]


def _numbers(values: dict[str, Any], *, is_stderr: bool) -> dict[str, float]:
    """The scores, or their standard errors, of what the harness keeps by `metric,filter`."""
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and metric.endswith("_stderr") == is_stderr and isinstance(value, int | float):
            metric = metric.removesuffix("_stderr")
            found[metric if chosen == "none" else f"{metric},{chosen}"] = float(value)
    return found


def main() -> None:
    """The harness's own command, which knows the model `dynmoe`."""
    try:
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        import dynmoe_ds.harness.harness_model  # noqa: F401 - registers the model

        cli_evaluate()
    except DynMoEError as error:
        sys.exit(f"dynmoe: {error}")


if __name__ == "__main__":
    main()
