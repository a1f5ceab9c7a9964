"""Pictures of where the time of a step goes and of the memory that it takes, for runs that logged it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dynmoe_ds.telemetry.drawing import (
    CALMED_NOTE,
    LAYER_COLOURS,
    Picture,
    calmed,
    finished,
    label_steps,
    legend_beside,
    mark_events,
    new_figure,
    plot,
)
from dynmoe_ds.telemetry.history import RunHistory, Series

# In the order in which they are stacked, with the colours that they have.
PARTS = {"compute": "#1f77b4", "communication": "#2a9d5c", "wait": "#d9480f", "data": "#b8860b"}
_MEMORY = "train/peak_memory_gib"


def draw_time(history: RunHistory) -> Iterator[Picture]:
    """The parts of a step, and memory: each where the run has the numbers."""
    if time_shares(history):
        yield _step_time_picture(history)
    if _MEMORY in history.series:
        yield _memory_picture(history)


def time_shares(history: RunHistory) -> dict[str, float]:
    """The share (0 to 1) that each part had of the time of all steps; empty where none was logged."""
    parts = {part: history.series.get(_name(part)) for part in PARTS}
    known = {part: series for part, series in parts.items() if series is not None}
    if len(known) < len(parts):
        return {}
    totals = {part: _seconds(series) for part, series in known.items()}
    whole = sum(totals.values())
    return {part: total / whole for part, total in totals.items()} if whole > 0 else {}


def _name(part: str) -> str:
    return f"train/{part}_time_s"


def _seconds(series: Series) -> float:
    """Of all steps: a line tells the mean of those since the line before."""
    steps = [step - before for step, before in zip(series.steps, [0, *series.steps], strict=False)]
    return sum(n * value for n, value in zip(steps, series.values, strict=True) if not math.isnan(value))


def _step_time_picture(history: RunHistory) -> Picture:
    figure, axes = new_figure(3.6)
    shares = time_shares(history)
    lines = {part: calmed(history.series[_name(part)]) for part in PARTS}
    steps = next(iter(lines.values())).steps
    labels = [f"{part} ({shares[part]:.0%})" for part in PARTS]
    values = [[1000 * value for value in line.values] for line in lines.values()]
    # A line tells of the steps before it; the first one of those from the start.
    axes.stackplot(
        [0, *steps], [[one[0], *one] for one in values], labels=labels, colors=list(PARTS.values()), linewidth=0
    )
    label_steps(axes, history)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time of a step (ms)")
    legend_beside(axes)
    caption = (
        "Where the time of a step goes, and in brackets the share of the whole run. Communication: collectives for "
        "which the computation stands still. Wait: for the slowest rank, before a collective can begin. Data: for the "
        "next batch."
    )
    caption += CALMED_NOTE if lines["compute"] is not history.series[_name("compute")] else ""
    return finished("step_time", "Time of a step", caption, figure, axes)


def _memory_picture(history: RunHistory) -> Picture:
    figure, axes = new_figure(3.2)
    plot(axes, history.series[_MEMORY], color=LAYER_COLOURS[0], linewidth=1.8)
    label_steps(axes, history)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("most memory of a rank (GiB)")
    caption = (
        "The memory of the rank that used most. On a GPU it is the most that was allocated since the log line before, "
        "and follows the experts that come and go; on a CPU it is the most since the process began, which never falls."
    )
    return finished("memory", "Memory", caption + mark_events(axes, history), figure, axes)
