"""Pictures of the experts of a layer: how long each lived, and how many tokens chose it over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dynmoe_ds.telemetry.drawing import (
    BIRTH_COLOUR,
    DEATH_COLOUR,
    UNKNOWN_COLOUR,
    Picture,
    colour_bar,
    finished,
    label_steps,
    new_figure,
    rows_height,
)
from dynmoe_ds.telemetry.history import ExpertLife, LayerHistory, LoadLine, RunHistory
from dynmoe_ds.telemetry.load_grids import expert_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_EXPERTS_SHOWN = 40
LOAD_COLOURS = "viridis"


def draw_experts(history: RunHistory, shown: Sequence[LayerHistory]) -> Iterator[Picture]:
    """Lives and loads, layer by layer, where the run has recorded them."""
    for number, layer in enumerate(shown):
        if layer.lives:
            yield _lives_picture(history, layer, f"lives_{number:02d}")
        if layer.loads and layer.lives:
            yield _load_picture(history, layer, f"load_{number:02d}")


def _lives_picture(history: RunHistory, layer: LayerHistory, name: str) -> Picture:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    lives, note = _shown_lives(layer, history.last_step)
    figure, axes = new_figure(rows_height(len(lives)))
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
    grid = expert_grid(layer.loads, [life.expert_id for life in lives])
    figure, axes = new_figure(rows_height(len(lives)))
    axes.set_facecolor("#eeeeee")
    axes.grid(visible=False)
    rows = np.arange(len(lives) + 1) - 0.5
    mesh = axes.pcolormesh(
        grid.edges, rows, np.ma.masked_invalid(grid.rows), cmap=LOAD_COLOURS, vmin=0, vmax=max([*grid.known, 1.0])
    )
    _expert_rows(axes, lives, with_parents=False)
    label_steps(axes, history)
    colour_bar(figure, axes, mesh, "tokens that\nchose it (%)")
    caption = (
        "Which experts the tokens chose over time. Bright: many tokens chose the expert; dark: few did; grey: "
        "the expert did not exist or nothing was recorded. A token may choose several experts, so a column "
        "can add up to more than 100 %."
    )
    return finished(name, f"Load of the experts of {layer.name}", caption + grid.note + note, figure, axes)


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


def _expert_rows(axes: Axes, lives: Sequence[ExpertLife], *, with_parents: bool) -> None:
    """One labelled row per expert id."""
    labels = [
        f"{life.expert_id} ← {life.parent_id}" if with_parents and life.parent_id is not None else str(life.expert_id)
        for life in lives
    ]
    axes.set_yticks(range(len(lives)), labels, fontsize=9)
    axes.set_ylim(len(lives) - 0.5, -0.5)  # the first expert on top
    axes.set_ylabel("expert id")
