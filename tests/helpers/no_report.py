"""Runs that draw no report, whose pictures take longer than a small training."""

from __future__ import annotations

from dynmoe_ds.training import run_log


def draw_no_report() -> None:
    """For a rank: it lasts as long as its process. The other ranks would wait for rank 0 meanwhile."""
    run_log.write_report = lambda run_dir: None
