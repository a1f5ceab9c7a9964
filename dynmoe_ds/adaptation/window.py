"""The window: the optimiser steps whose records the next adaptation is decided from."""

from __future__ import annotations

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.routing import RoutingRecords


class RecordingWindow:
    """Sums the records of the last `window_steps` of every `every_steps` optimiser steps. Steps count from 1."""

    def __init__(self, config: AdaptationConfig) -> None:
        self._config = config
        self._sum: dict[str, RoutingRecords] = {}

    def add(self, step: int, records: dict[str, RoutingRecords]) -> None:
        """Count the records of optimiser step `step` if it lies in a window."""
        every, window = self._config.every_steps, self._config.window_steps
        if (step - 1) % every >= every - window:
            self._sum = add_records(self._sum, records)

    def is_due(self, step: int) -> bool:
        """Whether an adaptation follows optimiser step `step`."""
        return step % self._config.every_steps == 0

    def take(self) -> dict[str, RoutingRecords]:
        """The window's sums of this rank by layer; empties the window."""
        taken, self._sum = self._sum, {}
        return taken


def add_records(a: dict[str, RoutingRecords], b: dict[str, RoutingRecords]) -> dict[str, RoutingRecords]:
    """Records of both, added layer by layer."""
    return a | {name: a[name] + record if name in a else record for name, record in b.items()}
