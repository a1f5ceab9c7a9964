"""The pictures of all layers over the run: which numbers they draw of which layer, and where they mark events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dynmoe_ds.telemetry import pictures
from dynmoe_ds.telemetry.drawing import BIRTH_COLOUR, DEATH_COLOUR
from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.pictures import draw_pictures
from dynmoe_ds.telemetry.run_folder import RunFolder
from tests.telemetry.drawn_axes import catch_axes, lines_of
from tests.telemetry.events_for_tests import event

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS = ("layers.0.mlp", "layers.2.mlp", "layers.4.mlp")


def change(before: int, after: int, pruned: list[int], grown: list[int]) -> dict[str, Any]:
    """A layer's part of an event."""
    born = [{"expert_id": one, "slot": 0, "rank": 0, "parent_id": None, "seeding": "random"} for one in grown]
    (whole,) = event(pruned=pruned, grown=born, live_before=before, live_after=after)["layers"].values()
    return dict(whole)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Axes]:
    """Of 40 steps: the first layer grows and then swaps, the second only loses an expert, the third has no change."""
    folder = RunFolder(tmp_path)
    for step, overall, of_layers in ((10, 2.0, (1.0, 2.0, 3.0)), (25, 2.25, (1.5, 2.0, 3.25)), (40, 1.5, (0.5, 1, 3))):
        values = {"moe/mean_k": overall}
        for layer, k in zip(LAYERS, of_layers, strict=True):
            values |= {f"moe/mean_k/{layer}": k, f"moe/unrouted_share/{layer}": k / 8}
        folder.append_metrics(step, values, time_s=step)
    first, second, third = LAYERS
    changes = {first: change(4, 6, [], [10, 11]), second: change(4, 3, [1], []), third: change(4, 4, [], [])}
    folder.append_adaptation(event(20) | {"layers": changes})
    changes = {first: change(6, 6, [0], [12]), second: change(3, 3, [], []), third: change(4, 4, [], [])}
    folder.append_adaptation(event(30) | {"layers": changes})
    folder.close()
    caught = catch_axes(monkeypatch, pictures)
    list(draw_pictures(read_history(tmp_path)))
    return caught


def test_live_experts_change_at_events_that_are_marked(drawn: dict[str, Axes]) -> None:
    axes = drawn["live_experts"]
    lines = {label: points for label, points in lines_of(axes).items() if label.startswith("layer ")}
    wanted = {"layer 0": (4, 6, 6, 6), "layer 2": (4, 3, 3, 3), "layer 4": (4, 4, 4, 4)}
    offsets = (-0.09, 0, 0.09)  # so that equal counts stay visible
    assert list(lines) == list(wanted)
    for (label, counts), offset in zip(wanted.items(), offsets, strict=True):
        assert [step for step, _ in lines[label]] == [0, 20, 30, 40]
        assert [live for _, live in lines[label]] == pytest.approx([count + offset for count in counts])
    assert {line.get_drawstyle() for line in axes.lines if line.get_label() in wanted} == {"steps-post"}
    marks = [line for line in axes.lines if line.get_marker() in ("^", "v") and len(line.get_xydata())]  # type: ignore[arg-type]
    found = [(mark.get_marker(), mark.get_markerfacecolor(), mark.get_xydata().tolist()) for mark in marks]  # type: ignore[union-attr]
    assert found == [
        ("^", BIRTH_COLOUR, [[20, pytest.approx(5.91)], [30, pytest.approx(5.91)]]),
        ("v", DEATH_COLOUR, [[30, pytest.approx(5.91)]]),
        ("v", DEATH_COLOUR, [[20, pytest.approx(3)]]),
    ]
    for mark in marks:
        rise = mark.get_transform().transform((20, 4))[1] - axes.transData.transform((20, 4))[1]
        assert (rise > 0) == (mark.get_marker() == "^") and rise, "a birth above the line, a death below"
    assert axes.get_ylim() == pytest.approx((2.2, 6.8)) and axes.get_xlim() == (0, 40)


def test_mean_k_over_steps_and_over_layers(drawn: dict[str, Axes]) -> None:
    assert lines_of(drawn["mean_k"]) == {
        "layer 0": [(10, 1.0), (25, 1.5), (40, 0.5)],
        "layer 2": [(10, 2.0), (25, 2.0), (40, 1.0)],
        "layer 4": [(10, 3.0), (25, 3.25), (40, 3.0)],
        "all layers": [(10, 2.0), (25, 2.25), (40, 1.5)],
    }
    axes = drawn["mean_k_by_layer"]
    assert lines_of(axes) == {
        "first log line": [(0, 1.0), (1, 2.0), (2, 3.0)],
        "last log line": [(0, 0.5), (1, 1.0), (2, 3.0)],
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["layer 0", "layer 2", "layer 4"]
    assert [drawn[name].get_ylim()[0] for name in ("mean_k", "mean_k_by_layer")] == [0, 0]


def test_tokens_without_an_expert_in_percent_and_with_events(drawn: dict[str, Axes]) -> None:
    axes = drawn["unrouted_share"]
    lines = lines_of(axes)
    assert lines["layer 0"] == [(10, 12.5), (25, 18.75), (40, 6.25)]
    assert lines["layer 4"] == [(10, 37.5), (25, 40.625), (40, 37.5)]
    dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]  # type: ignore[index]
    assert dotted == [20, 30]
