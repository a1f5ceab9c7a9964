"""Pictures of how tokens are spread over experts and of what they cost, for runs that logged it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynmoe_ds.telemetry.drawing import (
    CALMED_NOTE,
    LAYER_COLOURS,
    Picture,
    calmed,
    finished,
    label_layers,
    label_steps,
    legend_beside,
    new_figure,
    plot,
    plot_layers,
)
from dynmoe_ds.telemetry.history import LayerHistory, RunHistory, Series
from dynmoe_ds.telemetry.trackers import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KIND_PREFIX = "mean_k_per_kind/"
MAX_KINDS_SHOWN = len(LAYER_COLOURS)
MARKS: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False}
HELD_OUT_MARKS: dict[str, Any] = {**MARKS, "linestyle": "none", "markerfacecolor": "white"}


def draw_routing(
    history: RunHistory, shown: Sequence[LayerHistory], names: Mapping[str, str], note: str
) -> Iterator[Picture]:
    """Entropy of load, experts per kind of tokens, active parameters: each where the run has the numbers.

    shown: the layers to draw over time. names: labels of all layers. note: a sentence about layers that are not shown.
    """
    if any(layer.load_entropy.steps for layer in shown):
        yield _entropy_picture(history, shown, names, note)
    kinds = kinds_of(history)
    if kinds:
        yield _kinds_picture(history, kinds)
        if len(history.layers) > 1:
            yield _kinds_by_layer_picture(history, kinds, names)
    if "moe/active_parameters" in history.series:
        yield _active_picture(history)


def kinds_of(history: RunHistory) -> list[str]:
    """The kinds of tokens that were logged, in the order in which they first were."""
    prefixes = (f"moe/{KIND_PREFIX}", f"eval/{KIND_PREFIX}")
    found = (name.removeprefix(prefix) for name in history.series for prefix in prefixes if name.startswith(prefix))
    return list(dict.fromkeys(kind.partition("/")[0] for kind in found))


def _entropy_picture(
    history: RunHistory, shown: Sequence[LayerHistory], names: Mapping[str, str], note: str
) -> Picture:
    figure, axes = new_figure(3.2)
    is_calmed = plot_layers(axes, [(names[layer.name], layer.load_entropy) for layer in shown])
    label_steps(axes, history)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("entropy of load / ln K")
    legend_beside(axes)
    caption = (
        "How evenly the live experts of a layer share the tokens: 1 means that all take equally many, 0 that one takes "
        "them all. It is the entropy of their shares, divided by that of equal shares."
    )
    return finished(
        "load_entropy", "Evenness of load", caption + (CALMED_NOTE if is_calmed else "") + note, figure, axes
    )


def _kinds_picture(history: RunHistory, kinds: Sequence[str]) -> Picture:
    figure, axes = new_figure(3.6)
    is_calmed = has_held_out = False
    for kind, colour in zip(kinds, LAYER_COLOURS, strict=False):
        train, held_out = (history.series.get(f"{group}/{KIND_PREFIX}{kind}") for group in ("moe", "eval"))
        if train is not None:
            is_calmed = is_calmed or calmed(train) is not train
            plot(axes, calmed(train), color=colour, linewidth=1.6, label=kind)
        if held_out is not None:
            has_held_out = True
            axes.plot(held_out.steps, held_out.values, color=colour, **HELD_OUT_MARKS)
    _mean_k_axis(axes)
    label_steps(axes, history)
    legend_beside(axes)
    caption = "How many experts a token of each kind uses on average over all layers; the data say of what kind it is."
    caption += " Circles are held-out data." if has_held_out else ""
    caption += CALMED_NOTE if is_calmed else ""
    return finished("mean_k_per_kind", "Experts per token by kind", caption + _kinds_note(kinds), figure, axes)


def _kinds_by_layer_picture(history: RunHistory, kinds: Sequence[str], names: Mapping[str, str]) -> Picture:
    figure, axes = new_figure(3.2)
    group = "eval" if any(name.startswith(f"eval/{KIND_PREFIX}") for name in history.series) else "moe"
    places = range(len(history.layers))
    empty = Series(steps=[], values=[float("nan")])
    for kind, colour in zip(kinds, LAYER_COLOURS, strict=False):
        of_layers = [history.series.get(f"{group}/{KIND_PREFIX}{kind}/{layer.name}", empty) for layer in history.layers]
        axes.plot(places, [series.values[-1] for series in of_layers], color=colour, label=kind, **MARKS)
    label_layers(axes, [names[layer.name] for layer in history.layers])
    _mean_k_axis(axes)
    legend_beside(axes)
    of_what = "held-out data at the last evaluation" if group == "eval" else "training data at the last log line"
    caption = (
        "How many experts a token of each kind uses on average in each layer, the one nearest the input on the left: "
        f"{of_what}."
    )
    title = "Experts per token by kind and layer"
    return finished("mean_k_per_kind_by_layer", title, caption + _kinds_note(kinds), figure, axes)


def _active_picture(history: RunHistory) -> Picture:
    from matplotlib.ticker import FuncFormatter

    figure, axes = new_figure(3.2)
    train, held_out = history.series["moe/active_parameters"], history.series.get("eval/active_parameters")
    plot(axes, calmed(train), color=LAYER_COLOURS[0], linewidth=1.6, label="training data")
    caption = (
        "How many parameters an average token meets: all but the experts, and the experts that it uses. "
        "Two operations per parameter are most of what a token costs."
    )
    if held_out is not None:
        axes.plot(held_out.steps, held_out.values, color=LAYER_COLOURS[1], label="held-out data", **HELD_OUT_MARKS)
    label_steps(axes, history)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("active parameters")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    legend_beside(axes)
    caption += CALMED_NOTE if calmed(train) is not train else ""
    return finished("active_parameters", "Active parameters per token", caption, figure, axes)


def _mean_k_axis(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.set_ylabel("experts per token (mean k)")


def _kinds_note(kinds: Sequence[str]) -> str:
    return "" if len(kinds) <= MAX_KINDS_SHOWN else f" The first {MAX_KINDS_SHOWN} of {len(kinds)} kinds are shown."
