"""Numbers, events and pictures of a run: metrics, the run folder, trackers and the report."""

from dynmoe_ds.telemetry.metrics import METRICS, Metric, is_of_the_machine, meaning_of, reduce_over_ranks, tier_of
from dynmoe_ds.telemetry.report import write_report
from dynmoe_ds.telemetry.run_folder import RunFolder, read_adaptation, read_experts, read_metrics
from dynmoe_ds.telemetry.trackers import ConsoleTracker, JsonLinesTracker, Tracker, WandbTracker, build_trackers

__all__ = [
    "METRICS",
    "ConsoleTracker",
    "JsonLinesTracker",
    "Metric",
    "RunFolder",
    "Tracker",
    "WandbTracker",
    "build_trackers",
    "is_of_the_machine",
    "meaning_of",
    "read_adaptation",
    "read_experts",
    "read_metrics",
    "reduce_over_ranks",
    "tier_of",
    "write_report",
]
