"""Metrics that the tests log."""

from __future__ import annotations

from dynmoe_ds.telemetry.metrics import Metric


def metrics(**values: float) -> list[Metric]:
    """Metrics by name with `__` for the slash."""
    return [Metric(name=name.replace("__", "/"), value=value, reduction="mean") for name, value in values.items()]
