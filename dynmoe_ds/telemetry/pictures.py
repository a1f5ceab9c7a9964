"""The pictures of the report; matplotlib is imported only when a picture is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dynmoe_ds.telemetry.drawing import (
    CALMED_NOTE,
    LAYER_COLOURS,
    STYLE,
    Picture,
    calmed,
    colour_bar,
    finished,
    label_layers,
    label_steps,
    legend_beside,
    new_figure,
    percent,
    plot,
    plot_layers,
    tokens_above,
    whole_numbers,
)
from dynmoe_ds.telemetry.exact_match_pictures import draw_exact_match
from dynmoe_ds.telemetry.history import ExpertLife, LayerHistory, LoadLine, RunHistory, Series
from dynmoe_ds.telemetry.routing_pictures import draw_routing
from dynmoe_ds.telemetry.time_pictures import draw_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS_SHOWN = 8
MAX_EXPERTS_SHOWN = 40
MAX_HEAT_MAP_COLUMNS = 200
MAX_EVENT_LINES = 40
MARK_SIZES = ((40, 6.0), (200, 4.0))  # up to so many births and deaths: marks of so many points

BIRTH_COLOUR, DEATH_COLOUR = "#1a7f37", "#cf222e"
UNKNOWN_COLOUR = "#bbbbbb"
TRAIN_COLOUR, HELD_OUT_COLOUR = "#1f77b4", "#d9480f"
LOAD_COLOURS = "viridis"


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
        yield from draw_time(history, shown, names, _layers_note(history))
        for number, layer in enumerate(shown):
            if layer.lives:
                yield _lives_picture(history, layer, f"lives_{number:02d}")
            if layer.loads and layer.lives:
                yield _load_picture(history, layer, f"load_{number:02d}")


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
    caption += _mark_events(axes, history)
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
    caption += _mark_events(axes, history) + _layers_note(history)
    return finished("unrouted_share", "Tokens without an expert", caption, figure, axes)


def _lives_picture(history: RunHistory, layer: LayerHistory, name: str) -> Picture:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    lives, note = _shown_lives(layer, history.last_step)
    figure, axes = new_figure(_rows_height(len(lives)))
    shares = _mean_shares(layer.loads)
    top = max([100 * share for share in shares.values()] + [1.0])
    mappable = ScalarMappable(norm=Normalize(0, top), cmap=LOAD_COLOURS)
    marks: dict[str, Any] = {"markeredgecolor": "white", "markersize": 7, "clip_on": False}
    for row, life in enumerate(lives):
        end = history.last_step if life.died is None else life.died
        is_known = life.expert_id in shares
        colour = tuple(mappable.to_rgba(np.array([100 * shares[life.expert_id]]))[0]) if is_known else UNKNOWN_COLOUR
        box: dict[str, Any] = {"height": 0.62, "color": colour, "edgecolor": "#555555", "linewidth": 0.5}
        axes.barh(row, end - life.born, left=life.born, **box)
        if not life.is_initial:
            axes.plot(life.born, row, marker="^", color=BIRTH_COLOUR, **marks)
        if life.died is not None:
            axes.plot(end, row, marker="X", color=DEATH_COLOUR, **marks)
    _expert_rows(axes, lives, with_parents=True)
    label_steps(axes, history)
    axes.grid(axis="y", visible=False)
    if shares:
        colour_bar(figure, axes, mappable, "tokens that chose it,\nmean over its life (%)")
    caption = (
        "One bar per expert, from its first step to its last; the brighter the bar, the more tokens chose the expert."
    )
    if any(not life.is_initial for life in lives):
        caption += " A green triangle is a birth."
    if any(life.died is not None for life in lives):
        caption += " A red cross is a pruning."
    if any(life.parent_id is not None for life in lives):
        child = next(life for life in lives if life.parent_id is not None)
        caption += f" “{child.expert_id} ← {child.parent_id}” means that expert {child.expert_id} began as a copy of "
        caption += f"expert {child.parent_id}."
    if any(life.expert_id not in shares and life.born < history.last_step for life in lives):
        caption += " Grey bars: no load was recorded."
    return finished(name, f"Lives of the experts of {layer.name}", caption + note, figure, axes)


def _load_picture(history: RunHistory, layer: LayerHistory, name: str) -> Picture:
    import numpy as np

    lives, note = _shown_lives(layer, history.last_step)
    loads = merged_loads(layer.loads, MAX_HEAT_MAP_COLUMNS)
    edges, columns = [loads[0].from_step], []
    for line in loads:
        if line.from_step > edges[-1]:  # windows of adaptations may have gaps between them
            edges.append(line.from_step)
            columns.append([math.nan] * len(lives))
        edges.append(line.to_step)
        columns.append([_percent_of_tokens(line, life.expert_id) for life in lives])
    grid = np.array(columns).T
    figure, axes = new_figure(_rows_height(len(lives)))
    axes.set_facecolor("#eeeeee")
    axes.grid(visible=False)
    top = max(float(np.nanmax(grid)) if np.isfinite(grid).any() else 0.0, 1.0)
    rows = np.arange(len(lives) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, np.ma.masked_invalid(grid), cmap=LOAD_COLOURS, vmin=0, vmax=top)
    _expert_rows(axes, lives, with_parents=False)
    label_steps(axes, history)
    colour_bar(figure, axes, mesh, "tokens that\nchose it (%)")
    caption = (
        "Which experts the tokens chose over time. Bright: many tokens chose the expert; dark: few did; grey: "
        "the expert did not exist or nothing was recorded. A token may choose several experts, so a column "
        "can add up to more than 100 %."
    )
    if len(loads) < len(layer.loads):
        caption += f" {len(layer.loads)} recordings are merged into {len(loads)} columns."
    return finished(name, f"Load of the experts of {layer.name}", caption + note, figure, axes)


def merged_loads(loads: Sequence[LoadLine], at_most: int) -> list[LoadLine]:
    """The same loads in at most so many lines: neighbours are added up."""
    size = math.ceil(len(loads) / at_most)
    merged = []
    for start in range(0, len(loads), size):
        part = loads[start : start + size]
        tokens: dict[int, int] = {}
        for line in part:
            for expert_id, count in line.tokens_per_expert.items():
                tokens[expert_id] = tokens.get(expert_id, 0) + count
        merged.append(
            LoadLine(
                from_step=part[0].from_step,
                to_step=part[-1].to_step,
                tokens_per_expert=tokens,
                num_tokens=sum(line.num_tokens for line in part),
            )
        )
    return merged


def _percent_of_tokens(line: LoadLine, expert_id: int) -> float:
    if not line.num_tokens or expert_id not in line.tokens_per_expert:
        return math.nan
    return 100 * line.tokens_per_expert[expert_id] / line.num_tokens


def _mean_shares(loads: Sequence[LoadLine]) -> dict[int, float]:
    """Per expert: the tokens that chose it per token of the lines in which it was live."""
    chosen: dict[int, int] = {}
    offered: dict[int, int] = {}
    for line in loads:
        for expert_id, tokens in line.tokens_per_expert.items():
            chosen[expert_id] = chosen.get(expert_id, 0) + tokens
            offered[expert_id] = offered.get(expert_id, 0) + line.num_tokens
    return {expert_id: chosen[expert_id] / offered[expert_id] for expert_id in chosen if offered[expert_id]}


def _shown_lives(layer: LayerHistory, last_step: int) -> tuple[list[ExpertLife], str]:
    """The lives to draw, by expert id, and a note where there were too many."""
    if len(layer.lives) <= MAX_EXPERTS_SHOWN:
        return layer.lives, ""
    by_length = sorted(layer.lives, key=lambda life: life.born - (last_step if life.died is None else life.died))
    kept = sorted(by_length[:MAX_EXPERTS_SHOWN], key=lambda life: life.expert_id)
    note = f" Of the {len(layer.lives)} experts that ever lived here, the {len(kept)} that lived longest are shown."
    return kept, note


def _layers_note(history: RunHistory) -> str:
    if len(history.layers) <= MAX_LAYERS_SHOWN:
        return ""
    return f" {MAX_LAYERS_SHOWN} of the {len(history.layers)} layers are shown, evenly spread over the depth."


def _mark_events(axes: Axes, history: RunHistory) -> str:
    """Thin lines where experts were born or pruned, and the caption's sentence about them."""
    steps = sorted({step for layer in history.layers for step, _ in [*layer.births, *layer.deaths]})
    if not steps or len(steps) > MAX_EVENT_LINES:
        return ""
    for step in steps:
        axes.axvline(step, color="#777777", linewidth=0.9, linestyle=":", zorder=1)
    return " Dotted vertical lines: experts were born or pruned."


def _rows_height(num_rows: int) -> float:
    return 1.3 + 0.24 * max(num_rows, 3)


def _expert_rows(axes: Axes, lives: Sequence[ExpertLife], *, with_parents: bool) -> None:
    """One labelled row per expert id."""
    labels = [
        f"{life.expert_id} ← {life.parent_id}" if with_parents and life.parent_id is not None else str(life.expert_id)
        for life in lives
    ]
    axes.set_yticks(range(len(lives)), labels, fontsize=9)
    axes.set_ylim(len(lives) - 0.5, -0.5)  # the first expert on top
    axes.set_ylabel("expert id")
