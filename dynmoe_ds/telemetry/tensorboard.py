"""Metrics and adaptation events for TensorBoard, in the run folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.telemetry.events import EventDict, describe_event
from dynmoe_ds.telemetry.metrics import Metric

TENSORBOARD_FOLDER = "tensorboard"
_EVENTS = "adaptation/events"


class TensorBoardTracker:
    """Writes what `tensorboard --logdir <run folder>` shows: a curve per metric, and adaptations as text.

    first_step: what an earlier part of the run wrote after it is hidden; so is what a run that goes back had written of
    the steps that it does again. Raises: ConfigError without the package.
    """

    def __init__(self, run_dir: str | Path, first_step: int = 0) -> None:
        require_tensorboard()
        self._folder = Path(run_dir) / TENSORBOARD_FOLDER
        self._last_step = first_step
        self._writer = self._open(first_step + 1 if first_step else None)

    def _open(self, hidden_from: int | None) -> Any:
        """A writer that hides what is there of that step and later ones."""
        from torch.utils.tensorboard import SummaryWriter  # imported here, and not before: it is slow

        return SummaryWriter(f"{self._folder}", purge_step=hidden_from)

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        if step <= self._last_step:  # the run has gone back to a checkpoint
            self._writer.close()
            self._writer = self._open(step)
        self._last_step = step
        for metric in metrics:
            self._writer.add_scalar(metric.name, metric.value, step)

    def log_event(self, event: EventDict) -> None:
        if lines := describe_event(event):
            self._writer.add_text(_EVENTS, "\n\n".join(lines), event["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def require_tensorboard() -> None:
    """Raises: ConfigError if the package is not there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "telemetry.tensorboard is true but the package tensorboard is not installed. Run `pip install "
            "'dynmoe-ds[tensorboard]'`, or set telemetry.tensorboard=false."
        )
