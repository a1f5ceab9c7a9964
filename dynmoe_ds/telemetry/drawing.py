"""What every picture of the report is made of: style, figures, lines, axes.

matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynmoe_ds.telemetry.history import RunHistory, Series
from dynmoe_ds.telemetry.trackers import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

WIDTH_INCHES = 9.0
DOTS_PER_INCH = 110
SMOOTHING_FROM_POINTS = 150
MAX_LETTERS_BELOW = 90  # names of layers that fit side by side under an axis
MAX_EVENT_LINES = 40
CALMED_NOTE = " Lines are moving means."
BIRTH_COLOUR, DEATH_COLOUR = "#1a7f37", "#cf222e"
UNKNOWN_COLOUR = "#bbbbbb"
LAYER_COLOURS = (
    *("#1f77b4", "#d9480f", "#2a9d5c", "#8e44ad", "#b8860b", "#c2185b", "#0097a7", "#5d4037"),
    "#7f7f7f",
)
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "text.parse_math": False,  # layer names are the user's, and may hold a dollar sign
}
STEP_LABEL = "optimiser step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A drawn picture: `name` is a file name without suffix, `caption` one or two sentences for a stranger."""

    name: str
    title: str
    caption: str
    png: bytes


def new_figure(height_inches: float) -> tuple[Figure, Axes]:
    """A figure outside pyplot, so that nothing global is touched and no window system is looked for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def finished(name: str, title: str, caption: str, figure: Figure, axes: Axes) -> Picture:
    """The picture of a figure, with its title."""
    axes.set_title(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Picture(name=name, title=title, caption=caption, png=buffer.getvalue())


def plot(axes: Axes, series: Series, **style: Any) -> None:
    """A line; dots as well where there are too few points to see a line."""
    marker = "o" if len(series.steps) <= 2 else None
    axes.plot(series.steps, series.values, marker=marker, clip_on=False, **style)


def plot_layers(axes: Axes, series_by_label: Sequence[tuple[str, Series]]) -> bool:
    """One line per layer; whether any of them had to be calmed."""
    is_calmed = False
    for (label, series), colour in zip(series_by_label, LAYER_COLOURS, strict=False):
        if series.steps:
            calm = calmed(series)
            is_calmed = is_calmed or calm is not series
            plot(axes, calm, color=colour, linewidth=1.6, label=label)
    return is_calmed


def calmed(series: Series) -> Series:
    """The series itself, or its moving mean where it has so many points that they would draw as a thick band."""
    if len(series.steps) <= SMOOTHING_FROM_POINTS:
        return series
    return smoothed(series, half_width=max(2, len(series.steps) // 100))


def smoothed(series: Series, half_width: int) -> Series:
    """The mean of up to `half_width` values on either side of each place and its own; NaN counts as absent.

    Near the ends the window shrinks on both sides alike, so that a steep start is not flattened.
    """
    sums, counts = [0.0], [0]
    for value in series.values:
        is_number = not math.isnan(value)
        sums.append(sums[-1] + (value if is_number else 0.0))
        counts.append(counts[-1] + is_number)
    means = []
    last = len(series.values) - 1
    for index in range(last + 1):
        reach = min(half_width, index, last - index)
        start, end = index - reach, index + reach + 1
        count = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / count if count else math.nan)
    return Series(steps=series.steps, values=means)


def percent(shares: Series) -> Series:
    """Shares from 0 to 1 as percentages."""
    return Series(steps=shares.steps, values=[100 * value for value in shares.values])


def label_steps(axes: Axes, history: RunHistory) -> None:
    """The axis below counts all steps of the run."""
    axes.set_xlabel(STEP_LABEL)
    axes.set_xlim(0, max(history.last_step, 1))
    whole_numbers(axes.xaxis)


def label_layers(axes: Axes, labels: Sequence[str]) -> None:
    """The axis below counts layers, from the input to the output."""
    is_crowded = sum(map(len, labels)) > MAX_LETTERS_BELOW
    axes.set_xticks(range(len(labels)), labels, rotation=90 if is_crowded else 0)


def tokens_above(axes: Axes, history: RunHistory) -> str:
    """An axis above that counts training tokens, and the caption's sentence about it; nothing where none were logged.

    A run reads the same number of tokens in every step.
    """
    from matplotlib.ticker import FuncFormatter

    seen = history.series.get("train/tokens_seen")
    if seen is None or not math.isfinite(seen.values[-1]) or seen.values[-1] <= 0:
        return ""
    per_step = seen.values[-1] / seen.steps[-1]

    def to_tokens(steps: Any) -> Any:
        return steps * per_step

    def to_steps(tokens: Any) -> Any:
        return tokens / per_step

    axis = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    axis.set_xlabel("training tokens seen")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short_number(tokens)))
    return " The upper axis counts the training tokens seen."


def mark_events(axes: Axes, history: RunHistory) -> str:
    """Thin lines where experts were born or pruned, and the caption's sentence about them."""
    steps = sorted({step for layer in history.layers for step, _ in [*layer.births, *layer.deaths]})
    if not steps or len(steps) > MAX_EVENT_LINES:
        return ""
    for step in steps:
        axes.axvline(step, color="#777777", linewidth=0.9, linestyle=":", zorder=1)
    return " Dotted vertical lines: experts were born or pruned."


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def rows_height(num_rows: int) -> float:
    """Inches of a figure with a labelled row for each of so many things."""
    return 1.3 + 0.24 * max(num_rows, 3)


def legend_beside(axes: Axes) -> None:
    """A legend to the right of the axes, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def colour_bar(figure: Figure, axes: Axes, mappable: Any, label: str) -> Colorbar:
    """A bar beside the axes that says what the colours mean."""
    return figure.colorbar(mappable, ax=axes, label=label, pad=0.02, aspect=14, fraction=0.06)
