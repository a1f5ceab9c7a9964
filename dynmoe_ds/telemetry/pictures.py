"""The pictures of the report; matplotlib is imported only when a picture is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dynmoe_ds.telemetry.drawing import (
    BIRTH_COLOUR,
    CALMED_NOTE,
    DEATH_COLOUR,
    LAYER_COLOURS,
    STYLE,
    Picture,
    calmed,
    finished,
    label_layers,
    label_steps,
    legend_beside,
    mark_events,
    new_figure,
    percent,
    plot,
    plot_layers,
    tokens_above,
    whole_numbers,
)
from dynmoe_ds.telemetry.exact_match_pictures import draw_exact_match
from dynmoe_ds.telemetry.expert_pictures import draw_experts
from dynmoe_ds.telemetry.history import LayerHistory, RunHistory, Series
from dynmoe_ds.telemetry.rank_pictures import draw_ranks
from dynmoe_ds.telemetry.routing_pictures import draw_routing
from dynmoe_ds.telemetry.time_pictures import draw_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS_SHOWN = 8
MARK_SIZES = ((40, 6.0), (200, 4.0))  # up to so many births and deaths: marks of so many points

TRAIN_COLOUR, HELD_OUT_COLOUR = "#1f77b4", "#d9480f"


def draw_pictures(history: RunHistory) -> Iterator[Picture]:
    """Every picture that the run has numbers for, one at a time: first the run, then layer by layer."""
    from matplotlib import rc_context

    shown = evenly_chosen(history.layers, MAX_LAYERS_SHOWN)
    names = short_names([layer.name for layer in history.layers])
    with rc_context(STYLE):
        if "train/loss" in history.series or "eval/loss" in history.series:
            yield _loss_picture(history)
        yield from draw_exact_match(history)
        if any(layer.live.steps for layer in shown):
            yield _live_picture(history, shown, names)
        if any(layer.mean_k.steps for layer in shown) or "moe/mean_k" in history.series:
            yield _mean_k_picture(history, shown, names)
        if sum(bool(layer.mean_k.steps) for layer in history.layers) > 1:
            yield _mean_k_by_layer_picture(history, names)
        if any(layer.unrouted_share.steps for layer in shown):
            yield _unrouted_picture(history, shown, names)
        yield from draw_routing(history, shown, names, _layers_note(history))
        yield from draw_time(history)
        yield from draw_ranks(history, shown, names, _layers_note(history))
        yield from draw_experts(history, shown)


def evenly_chosen(layers: Sequence[LayerHistory], at_most: int) -> list[LayerHistory]:
    """At most so many layers, evenly spread and with the first and the last."""
    if len(layers) <= at_most:
        return list(layers)
    return [layers[round(index * (len(layers) - 1) / (at_most - 1))] for index in range(at_most)]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names for legends: `layer 1` where all differ in one number only (`model.layers.1.mlp`), the full ones else."""
    pieces = {name: re.split(r"(\d+)", name) for name in names}
    if len(names) > 1 and len({len(piece) for piece in pieces.values()}) == 1:
        columns = list(zip(*pieces.values(), strict=True))
        differing = [index for index, column in enumerate(columns) if len(set(column)) > 1]
        if len(differing) == 1 and differing[0] % 2 == 1:  # odd pieces are the numbers
            return {name: f"layer {piece[differing[0]]}" for name, piece in pieces.items()}
    return {name: name for name in names}


def _loss_picture(history: RunHistory) -> Picture:
    figure, axes = new_figure(4.0)
    train, held_out = history.series.get("train/loss"), history.series.get("eval/loss")
    caption = "How wrong the model's next-token predictions are; lower is better."
    if train is not None:
        strong = calmed(train)
        if strong is not train:
            plot(axes, train, color=TRAIN_COLOUR, alpha=0.3)
            caption += " The strong line is a moving mean, the pale one each log line."
        plot(axes, strong, color=TRAIN_COLOUR, label="training data")
    if held_out is not None:
        marks: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False}
        axes.plot(held_out.steps, held_out.values, color=HELD_OUT_COLOUR, label="held-out data", **marks)
        caption += " Held-out data are never trained on: a gap that widens means that the model learns by heart."
    caption += mark_events(axes, history)
    label_steps(axes, history)
    axes.set_ylabel("loss")
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none")
    return finished("loss", "Loss", caption, figure, axes)


def _live_picture(history: RunHistory, shown: Sequence[LayerHistory], names: dict[str, str]) -> Picture:
    figure, axes = new_figure(4.0)
    spread = 0.09
    num_marks = sum(len(layer.births) + len(layer.deaths) for layer in shown)
    size = next((points for limit, points in MARK_SIZES if num_marks <= limit), None)
    counted = [value for layer in shown for value in layer.live.values if not math.isnan(value)] or [0.0]
    for number, layer in enumerate(shown):
        if not layer.live.steps:
            continue
        colour = LAYER_COLOURS[number]
        offset = (number - (len(shown) - 1) / 2) * spread
        counts = Series(steps=layer.live.steps, values=[value + offset for value in layer.live.values])
        plot(axes, counts, color=colour, drawstyle="steps-post", linewidth=1.8, label=names[layer.name])
        if size is not None:
            _mark_steps(axes, [step for step, _ in layer.births], counts, "^", BIRTH_COLOUR, size)
            _mark_steps(axes, [step for step, _ in layer.deaths], counts, "v", DEATH_COLOUR, size)
    if size is not None and num_marks:
        axes.plot([], [], "^", color=BIRTH_COLOUR, label="expert born")
        axes.plot([], [], "v", color=DEATH_COLOUR, label="expert pruned")
    label_steps(axes, history)
    whole_numbers(axes.yaxis)
    axes.set_ylim(min(counted) - 0.8, max(counted) + 0.8)
    axes.set_ylabel("live experts")
    legend_beside(axes)
    caption = "How many experts each mixture-of-experts layer has."
    if size is None:
        caption += f" The {num_marks} births and prunings are too many to mark here; the pictures of lives have them."
    elif num_marks:
        caption += " Triangles mark the steps at which experts were born or pruned; both can happen at one step."
    if len(shown) > 1:
        caption += " The lines are drawn slightly apart so that equal counts stay visible."
    return finished("live_experts", "Live experts", caption + _layers_note(history), figure, axes)


def _mark_steps(axes: Axes, steps: Sequence[int], line: Series, marker: str, colour: str, size: float) -> None:
    """Markers just above or below a line, so that a birth and a death at one step do not hide each other."""
    from matplotlib.transforms import ScaledTranslation

    at_step = dict(zip(line.steps, line.values, strict=True))
    figure = axes.get_figure()
    assert figure is not None, "the axes belong to a figure"
    rise_inches = (size if marker == "^" else -size) * 0.85 / 72
    (marks,) = axes.plot(
        steps,
        [at_step[step] for step in steps],
        linestyle="none",
        marker=marker,
        markersize=size,
        markerfacecolor=colour,
        markeredgecolor="white",
        markeredgewidth=0.6,
        clip_on=False,
        transform=axes.transData + ScaledTranslation(0, rise_inches, figure.dpi_scale_trans),
    )
    marks.set_in_layout(False)  # the layout does not see the shift and would shrink the axes


def _mean_k_picture(history: RunHistory, shown: Sequence[LayerHistory], names: dict[str, str]) -> Picture:
    figure, axes = new_figure(3.6)
    is_calmed = plot_layers(axes, [(names[layer.name], layer.mean_k) for layer in shown])
    overall = history.series.get("moe/mean_k")
    if overall is not None and len(shown) != 1:
        plot(axes, calmed(overall), color="black", linestyle="--", linewidth=1.4, label="all layers")
    label_steps(axes, history)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("experts per token (mean k)")
    legend_beside(axes)
    caption = "How many experts a token uses on average; each token decides for itself. More cost more computation."
    caption += CALMED_NOTE if is_calmed else ""
    caption += tokens_above(axes, history) + _layers_note(history)
    return finished("mean_k", "Experts per token", caption, figure, axes)


def _mean_k_by_layer_picture(history: RunHistory, names: dict[str, str]) -> Picture:
    figure, axes = new_figure(3.2)
    layers = [layer for layer in history.layers if layer.mean_k.steps]
    places = range(len(layers))
    marks: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False}
    first, last = ([layer.mean_k.values[end] for layer in layers] for end in (0, -1))
    axes.plot(places, first, color="#999999", linestyle=":", label="first log line", **marks)
    axes.plot(places, last, color=LAYER_COLOURS[0], label="last log line", **marks)
    label_layers(axes, [names[layer.name] for layer in layers])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("experts per token (mean k)")
    legend_beside(axes)
    caption = "How many experts a token uses on average in each layer, the one nearest the input on the left."
    return finished("mean_k_by_layer", "Experts per token by layer", caption, figure, axes)


def _unrouted_picture(history: RunHistory, shown: Sequence[LayerHistory], names: dict[str, str]) -> Picture:
    figure, axes = new_figure(3.2)
    is_calmed = plot_layers(axes, [(names[layer.name], percent(layer.unrouted_share)) for layer in shown])
    label_steps(axes, history)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens without an expert (%)")
    legend_beside(axes)
    caption = "The share of tokens that chose no expert at all. Such tokens are what makes the run add an expert."
    caption += CALMED_NOTE if is_calmed else ""
    caption += mark_events(axes, history) + _layers_note(history)
    return finished("unrouted_share", "Tokens without an expert", caption, figure, axes)


def _layers_note(history: RunHistory) -> str:
    if len(history.layers) <= MAX_LAYERS_SHOWN:
        return ""
    return f" {MAX_LAYERS_SHOWN} of the {len(history.layers)} layers are shown, evenly spread over the depth."
