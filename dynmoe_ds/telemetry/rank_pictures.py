"""Pictures of the ranks that share the experts: how unevenly they work, which has most, what they send each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dynmoe_ds.telemetry.drawing import (
    CALMED_NOTE,
    LAYER_COLOURS,
    UNKNOWN_COLOUR,
    Picture,
    calmed,
    colour_bar,
    finished,
    label_steps,
    legend_beside,
    new_figure,
    plot,
    plot_layers,
    rows_height,
)
from dynmoe_ds.telemetry.history import LayerHistory, RunHistory, Series
from dynmoe_ds.telemetry.load_grids import loads_of_layers, rank_grid
from dynmoe_ds.telemetry.trackers import short_number

MAX_ROWS_NAMED = 40
MAX_HEIGHT_INCHES = 10.0
RANK_COLOURS = "RdBu_r"
LEAST_CONTRAST = 0.1  # so that what is as good as even looks even

SENT_ROWS, LEAST_ROWS = "moe/sent_row_bytes_per_token", "moe/least_row_bytes_per_token"
SENT_METADATA = "moe/sent_metadata_bytes_per_token"
_BYTES: dict[str, tuple[str, dict[str, Any]]] = {
    SENT_ROWS: ("rows", {"color": LAYER_COLOURS[0], "linewidth": 2.4}),
    LEAST_ROWS: ("fewest rows possible", {"color": "black", "linestyle": "--", "linewidth": 1.2}),
    SENT_METADATA: ("counts, slots, weights", {"color": LAYER_COLOURS[1], "linewidth": 1.6}),
}


def draw_ranks(
    history: RunHistory, shown: Sequence[LayerHistory], names: Mapping[str, str], note: str
) -> Iterator[Picture]:
    """Imbalance, load rank by rank, and bytes, each where the run has the numbers. shown, names, note: as for
    `draw_routing`.
    """
    if "moe/rank_imbalance" in history.series:
        yield _imbalance_picture(history, shown, names, note)
    if any(map(_has_ranks, shown)):
        yield _loads_picture(history, shown, names, note)
    if SENT_ROWS in history.series:
        yield _bytes_picture(history)


def sent_bytes_per_token(history: RunHistory) -> float | None:
    """All bytes that ranks sent each other for a token at the last log line; None where it is not known."""
    if SENT_ROWS not in history.series or SENT_METADATA not in history.series:
        return None
    total = history.series[SENT_ROWS].values[-1] + history.series[SENT_METADATA].values[-1]
    return total if math.isfinite(total) else None


def _has_ranks(layer: LayerHistory) -> bool:
    return any(line.rows_per_rank for line in layer.loads)


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


def _loads_picture(history: RunHistory, shown: Sequence[LayerHistory], names: Mapping[str, str], note: str) -> Picture:
    import numpy as np
    from matplotlib.colors import Normalize

    grids = {names[layer.name]: rank_grid(layer.loads) for layer in shown if _has_ranks(layer)}
    if len(grids) > 1:
        grids = {"all layers": rank_grid(loads_of_layers(history.layers)), **grids}
    num_rows = sum(len(grid.rows) for grid in grids.values())
    figure, axes = new_figure(min(rows_height(num_rows), MAX_HEIGHT_INCHES))
    axes.set_facecolor(UNKNOWN_COLOUR)
    axes.grid(visible=False)
    contrast = max([abs(value - 1) for grid in grids.values() for value in grid.known] + [LEAST_CONTRAST])
    colours: dict[str, Any] = {"cmap": RANK_COLOURS, "norm": Normalize(1 - contrast, 1 + contrast)}
    labels, top, every = {}, 0, math.ceil(num_rows / MAX_ROWS_NAMED)
    for name, grid in grids.items():
        rows = top + np.arange(len(grid.rows) + 1) - 0.5
        mesh = axes.pcolormesh(grid.edges, rows, np.ma.masked_invalid(grid.rows), **colours)
        axes.axhline(rows[-1], color="#555555", linewidth=0.8)
        for rank in range(0, len(grid.rows) - every + 1, every):
            labels[top + rank] = f"rank {rank}" if rank else f"{name}, rank 0"
        top += len(grid.rows)
    axes.set_yticks(list(labels), list(labels.values()), fontsize=9)
    axes.set_ylim(top - 0.5, -0.5)  # rank 0 on top
    label_steps(axes, history)
    bar = colour_bar(figure, axes, mesh, "rows of the rank /\nmean of all")
    bar.ax.set_ylim(bottom=max(0.0, 1 - contrast))
    caption = (
        "Which of the ranks that share the experts of a layer compute more rows than an equal share (red: the others "
        "wait for them) and which fewer (blue); white: as many. A rank is counted within its expert-parallel group."
    )
    caption += " Grey: nothing was recorded." if any(grid.has_gaps for grid in grids.values()) else ""
    return finished("rank_loads", "Load of the ranks", caption + next(iter(grids.values())).note + note, figure, axes)


def _bytes_picture(history: RunHistory) -> Picture:
    from matplotlib.ticker import FuncFormatter

    figure, axes = new_figure(3.2)
    is_calmed = False
    for name, (label, style) in _BYTES.items():
        if name in history.series:
            line = calmed(history.series[name])
            is_calmed = is_calmed or line is not history.series[name]
            plot(axes, line, label=label, **style)
    label_steps(axes, history)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("bytes per training token")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    legend_beside(axes)
    caption = (
        "What ranks send each other for a training token in all layers, forward and backward. Rows: the token's "
        "vectors, their results and gradients, once for each other rank with experts that it chose; the dashed line is "
        "the fewest that the choices allow. The rest says where rows belong."
    )
    caption += CALMED_NOTE if is_calmed else ""
    return finished("sent_bytes", "Bytes between ranks", caption, figure, axes)
