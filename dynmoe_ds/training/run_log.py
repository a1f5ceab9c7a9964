"""Everything that a run writes: its folder and its trackers, on rank 0; nothing on the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import torch.distributed as dist
import yaml

from dynmoe_ds.adaptation import AdaptationEvent
from dynmoe_ds.config.load import to_yaml
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.telemetry import Metric, RunFolder, Tracker, build_trackers, reduce_over_ranks, write_report
from dynmoe_ds.telemetry.run_folder import CHECKPOINT_FOLDER
from dynmoe_ds.training.tasks import Task


class RunLog:
    """The run folder and the trackers of a run that begins after optimiser step `first_step`.

    What an earlier part of the run wrote after that step is dropped: made only when it is certain that the run goes on.
    Collective: construction and `rewind`, so that all ranks learn of a folder that rank 0 cannot use, and `log`.
    """

    def __init__(self, config: RunConfig, task: Task, stream: TextIO | None, first_step: int) -> None:
        self._folder: RunFolder | None = None
        self._trackers: list[Tracker] = []
        on_first_rank(lambda: self._open(config, task, stream, first_step))

    def rewind(self, step: int) -> None:
        """Drop what this run wrote after optimiser step `step`, from which it goes on.

        Collective: every rank. Raises: on every rank what rank 0 raises, such as DataError for a broken line.
        """
        folder = self._folder
        on_first_rank(lambda: None if folder is None else folder.rewind(step))

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        """Reduce `metrics` over all ranks and record them for optimiser step `step`, from 1. Collective: every rank."""
        reduced = reduce_over_ranks(metrics)
        for tracker in self._trackers:
            tracker.log(step, reduced)

    def experts(self, step: int, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the experts' loads (their form: `RunFolder.append_experts`)."""
        if self._folder is not None:
            self._folder.append_experts(step, layers)

    def events(self, events: Sequence[AdaptationEvent]) -> None:
        """Record adaptations."""
        for event in events:
            for tracker in self._trackers:
                tracker.log_event(event.to_dict())

    def sample(self, text: str) -> None:
        """Record the text that the trained model wrote."""
        if self._folder is not None:
            self._folder.write_sample(text)

    def close(self) -> None:
        """End the trackers and draw the report from what was written."""
        for tracker in self._trackers:
            tracker.close()
        if self._folder is not None:
            self._folder.close()
            write_report(self._folder.path)

    def _open(self, config: RunConfig, task: Task, stream: TextIO | None, first_step: int) -> None:
        self._folder = RunFolder(config.run_dir)
        self._folder.rewind(first_step)
        if config.checkpoint.every_steps is not None:
            # By this a folder is known as one of a run that can be resumed, also before its first checkpoint.
            (self._folder.path / CHECKPOINT_FOLDER).mkdir(exist_ok=True)
        yaml_text = to_yaml(config)
        self._folder.write_config(yaml_text)
        self._folder.write_versions()
        task.write_files(self._folder.path)
        self._trackers = build_trackers(
            rank=0,
            folder=self._folder,
            config=yaml.safe_load(yaml_text),
            total_steps=config.training.steps,
            wandb_mode=config.telemetry.wandb_mode,
            wandb_project=config.telemetry.wandb_project,
            tensorboard=config.telemetry.tensorboard,
            detail=config.telemetry.detail,
            first_step=first_step,
            stream=stream,
        )


def on_first_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; the others wait for it, and no longer than it takes to fail.

    Collective: every rank. Raises: what rank 0 raises, on the others a DivergenceError that quotes it.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    attempt_together(lambda: action() if is_first else None)
