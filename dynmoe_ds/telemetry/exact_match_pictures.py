"""Pictures of the share of held-out questions that are answered exactly, by kind of question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dynmoe_ds.telemetry.drawing import (
    LAYER_COLOURS,
    Picture,
    finished,
    label_steps,
    legend_beside,
    new_figure,
    percent,
    plot,
)
from dynmoe_ds.telemetry.history import RunHistory

EXACT_MATCH = "eval/exact_match"
_MAX_KINDS_SHOWN = len(LAYER_COLOURS)


def exact_match(history: RunHistory) -> dict[str, float]:
    """The last share, 0 to 1, by kind of question; `all` first. Empty for runs that do not answer questions."""
    if EXACT_MATCH not in history.series:
        return {}
    kinds = sorted(name for name in history.series if name.startswith(f"{EXACT_MATCH}/"))
    names = {"all": EXACT_MATCH} | {name.removeprefix(f"{EXACT_MATCH}/"): name for name in kinds}
    return {kind: history.series[name].values[-1] for kind, name in names.items()}


def draw_exact_match(history: RunHistory) -> Iterator[Picture]:
    """The shares over the run, where it has any."""
    kinds = list(exact_match(history))[: _MAX_KINDS_SHOWN + 1]
    if not kinds:
        return
    figure, axes = new_figure(3.6)
    plot(axes, percent(history.series[EXACT_MATCH]), color="black", linestyle="--", label="all")
    for kind, colour in zip(kinds[1:], LAYER_COLOURS, strict=False):
        plot(axes, percent(history.series[f"{EXACT_MATCH}/{kind}"]), color=colour, label=kind)
    label_steps(axes, history)
    axes.set_ylim(0, 100)
    axes.set_ylabel("answered exactly (%)")
    legend_beside(axes)
    caption = "How many held-out questions the model answers word for word, by kind of question; higher is better."
    yield finished("exact_match", "Held-out questions answered", caption, figure, axes)


def draw_exact_match_of_runs(shares: Mapping[str, Mapping[str, float]]) -> Iterator[Picture]:
    """Bars side by side: the last shares of several runs by kind of question. shares: by run, then by kind."""
    kinds = list(dict.fromkeys(kind for of_run in shares.values() for kind in of_run))
    if not kinds:
        return
    figure, axes = new_figure(3.8)
    width = 0.8 / len(shares)
    for number, (run, of_run) in enumerate(shares.items()):
        places = [place + (number - (len(shares) - 1) / 2) * width for place in range(len(kinds))]
        heights = [100 * of_run.get(kind, float("nan")) for kind in kinds]
        axes.bar(places, heights, width, color=LAYER_COLOURS[number % len(LAYER_COLOURS)], label=run)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 100)
    axes.set_ylabel("answered exactly (%)")
    legend_beside(axes)
    caption = "How many held-out questions each run answers word for word in the end, by kind of question."
    yield finished("exact_match", "Held-out questions answered", caption, figure, axes)
