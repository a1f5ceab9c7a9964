"""The heat map of a layer's experts: which number is drawn where."""

from __future__ import annotations

from math import nan
from pathlib import Path

import pytest

from dynmoe_ds.telemetry import expert_pictures
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
