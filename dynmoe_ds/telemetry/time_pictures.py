"""Pictures of where the time of a step goes and of how unevenly ranks work, for runs that logged it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from dynmoe_ds.telemetry.drawing import (
    CALMED_NOTE,
    Picture,
    calmed,
    finished,
    label_steps,
    legend_beside,
    new_figure,
    plot,
    plot_layers,
)
from dynmoe_ds.telemetry.history import LayerHistory, RunHistory, Series

# In the order in which they are stacked, with the colours that they have.
PARTS = {"compute": "#1f77b4", "communication": "#2a9d5c", "wait": "#d9480f", "data": "#b8860b"}


def draw_time(
    history: RunHistory, shown: Sequence[LayerHistory], names: Mapping[str, str], note: str
) -> Iterator[Picture]:
    """The parts of a step, and the imbalance of ranks. shown, names, note: as for `draw_routing`."""
    if time_shares(history):
        yield _step_time_picture(history)
    if "moe/rank_imbalance" in history.series:
        yield _imbalance_picture(history, shown, names, note)


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


def _imbalance_picture(
    history: RunHistory, shown: Sequence[LayerHistory], names: Mapping[str, str], note: str
) -> Picture:
    figure, axes = new_figure(3.2)
    empty = Series(steps=[], values=[])
    of_layers = [history.series.get(f"moe/rank_imbalance/{layer.name}", empty) for layer in shown]
    is_calmed = plot_layers(axes, [(names[layer.name], one) for layer, one in zip(shown, of_layers, strict=True)])
    if len(shown) != 1:
        overall = calmed(history.series["moe/rank_imbalance"])
        plot(axes, overall, color="black", linestyle="--", linewidth=1.4, label="all layers")
    label_steps(axes, history)
    axes.set_ylim(bottom=1)
    axes.set_ylabel("busiest rank / mean rank")
    legend_beside(axes)
    caption = (
        "How unevenly the tokens' rows fall on the ranks that share the experts of a layer: 1 means that all compute "
        "equally many. The others wait for the busiest one in every layer."
    )
    caption += (CALMED_NOTE if is_calmed else "") + note
    return finished("rank_imbalance", "Imbalance of ranks", caption, figure, axes)
