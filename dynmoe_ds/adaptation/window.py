"""The window: the optimiser steps whose records the next adaptation is decided from."""

from __future__ import annotations

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.routing import RoutingRecords


class RecordingWindow:
    """Sums the records of the `window_steps` optimiser steps before every adaptation. Steps count from 1."""

    def __init__(self, config: AdaptationConfig) -> None:
        self._config = config
        self._sum: dict[str, RoutingRecords] = {}

    def add(self, step: int, records: dict[str, RoutingRecords]) -> None:
        """Count the records of optimiser step `step` if it lies in a window."""
        if self.covers(step):
            self._sum = add_records(self._sum, records)

    def covers(self, step: int) -> bool:
        """Whether optimiser step `step` lies in a window."""
        return self.end(step) - step < self._config.window_steps

    def end(self, step: int) -> int:
        """The first step from `step` on that an adaptation follows."""
        every = self._config.every_steps
        first = every if self._config.first_step is None else self._config.first_step
        return first + max(-(-(step - first) // every), 0) * every

    def is_due(self, step: int) -> bool:
        """Whether an adaptation follows optimiser step `step`."""
        return self.end(step) == step

    def records(self) -> dict[str, RoutingRecords]:
        """The sums so far, which stay where they are."""
        return dict(self._sum)

    def set(self, records: dict[str, RoutingRecords]) -> None:
        """Go on from sums that `records` gave."""
        self._sum = dict(records)

    def take(self) -> dict[str, RoutingRecords]:
        """The window's sums of this rank by layer; empties the window."""
        taken, self._sum = self._sum, {}
        return taken


def add_records(a: dict[str, RoutingRecords], b: dict[str, RoutingRecords]) -> dict[str, RoutingRecords]:
    """Records of both, added layer by layer."""
    return a | {name: a[name] + record if name in a else record for name, record in b.items()}
