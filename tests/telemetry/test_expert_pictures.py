"""The lives of a layer's experts and the heat map of their loads: which number is drawn where."""

from __future__ import annotations

from math import nan
from pathlib import Path

import pytest

from dynmoe_ds.telemetry import expert_pictures
from dynmoe_ds.telemetry.drawing import BIRTH_COLOUR, DEATH_COLOUR, UNKNOWN_COLOUR
from dynmoe_ds.telemetry.expert_pictures import draw_experts
from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.run_folder import RunFolder
from tests.telemetry.drawn_axes import catch_axes, rows_of
from tests.telemetry.events_for_tests import LAYER, event


def test_the_load_of_experts_that_are_born_and_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert 1 dies at step 20 and expert 7 is born; expert 0 loses tokens to it."""
    folder = RunFolder(tmp_path)
    folder.append_metrics(40, {"train/loss": 1.0}, time_s=1.0)
    for step, load in ((10, {0: 30, 1: 10}), (20, {0: 28, 1: 2, 7: 0}), (40, {0: 8, 7: 64})):
        folder.append_experts(step, {LAYER: {"load": load, "num_tokens": 2 * step, "num_unrouted": 0}})
    grown = [{"expert_id": 7, "slot": 2, "rank": 0, "parent_id": 0, "seeding": "split"}]
    of_two = {"tokens_per_expert": {"0": 28, "1": 2}, "live_before": 2, "live_after": 2}
    folder.append_adaptation(event(20, pruned=[1], grown=grown, **of_two))
    folder.close()
    caught = catch_axes(monkeypatch, expert_pictures)
    history = read_history(tmp_path)
    assert [picture.name for picture in draw_experts(history, history.layers)] == ["lives_00", "load_00"]
    axes = caught["load_00"]
    expected = [[150, 70, 10], [50, 5, nan], [nan, 0, 80]]  # percent of 20, 40 and 80 tokens
    for row, wanted in zip(rows_of(axes), expected, strict=True):
        assert row == pytest.approx(wanted, nan_ok=True)
    corners = axes.collections[0].get_coordinates()  # type: ignore[attr-defined]
    assert corners[0, :, 0].tolist() == [0, 10, 20, 40]
    assert corners[:, 0, 1].tolist() == [-0.5, 0.5, 1.5, 2.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "7"]
    assert axes.get_ylim() == (2.5, -0.5), "the first expert on top"
    assert axes.collections[0].get_clim() == (0, 150)


def test_a_bar_from_birth_to_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert 1 dies at step 20, expert 7 begins at step 30 as a copy of 0; of expert 2 no load was recorded."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    folder = RunFolder(tmp_path)
    folder.append_metrics(50, {"train/loss": 1.0}, time_s=1.0)
    for step, num_tokens, load in ((20, 20, {0: 10, 1: 2}), (50, 40, {0: 20, 7: 30})):
        folder.append_experts(step, {LAYER: {"load": load, "num_tokens": num_tokens, "num_unrouted": 0}})
    before = {"tokens_per_expert": {"0": 10, "1": 2, "2": 0}, "live_before": 3, "live_after": 2}
    folder.append_adaptation(event(20, pruned=[1], grown=[], **before))
    grown = [{"expert_id": 7, "slot": 1, "rank": 0, "parent_id": 0, "seeding": "copy_nearest"}]
    after = {"tokens_per_expert": {"0": 10, "2": 0}, "live_before": 2, "live_after": 3}
    folder.append_adaptation(event(30, pruned=[], grown=grown, **after))
    folder.close()
    caught = catch_axes(monkeypatch, expert_pictures)
    history = read_history(tmp_path)
    lives, _ = draw_experts(history, history.layers)
    axes = caught["lives_00"]
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    assert [(bar.get_x(), bar.get_width()) for bar in bars] == [(0, 50), (0, 20), (0, 50), (30, 20)]
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx([0, 1, 2, 3])
    shares = [30 / 60, 2 / 20, None, 30 / 40]  # of the tokens of the lines in which each lived
    assert [bar.get_facecolor() for bar in bars] == [
        to_rgba(UNKNOWN_COLOUR) if share is None else colormaps["viridis"](share / 0.75) for share in shares
    ]
    marks = [(line.get_marker(), line.get_color(), *map(tuple, line.get_xydata())) for line in axes.lines]  # type: ignore[arg-type]
    assert marks == [("X", DEATH_COLOUR, (20, 1)), ("^", BIRTH_COLOUR, (30, 3))]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "7 ← 0"]
    assert axes.get_ylim() == (3.5, -0.5) and axes.get_xlim() == (0, 50)
    assert "A green triangle is a birth. A red cross is a pruning." in lives.caption
    assert "expert 7 began as a copy of expert 0. Grey bars: no load was recorded." in lives.caption
