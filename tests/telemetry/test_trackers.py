from __future__ import annotations

import importlib.util
import io
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.telemetry import trackers
from dynmoe_ds.telemetry.metrics import Metric, Tier
from dynmoe_ds.telemetry.run_folder import RunFolder, read_adaptation, read_metrics
from dynmoe_ds.telemetry.tensorboard import TensorBoardTracker
from dynmoe_ds.telemetry.trackers import (
    ConsoleTracker,
    JsonLinesTracker,
    WandbTracker,
    build_trackers,
)
from tests.telemetry.events_for_tests import event
from tests.telemetry.metrics_for_tests import metrics


def test_json_lines_tracker_writes_the_run_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tracker = JsonLinesTracker(folder)
    tracker.log(5, metrics(train__loss=3.0, moe__mean_k=math.nan))
    tracker.log_event(event())
    tracker.close()
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 5 and line["train/loss"] == 3.0 and line["moe/mean_k"] is None
    assert read_adaptation(tmp_path) == [event()]


def written(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_tensorboard_has_curves_and_adaptations_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    for step in (10, 20, 30):
        tracker.log(step, metrics(train__loss=step / 10))
    tracker.log_event(event())
    tracker.close()
    found = written(tmp_path)
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(10, 1.0), (20, 2.0), (30, 3.0)]
    (text,) = found.Tensors("adaptation/events/text_summary")
    assert text.step == event()["step"] and b"grew expert 4" in text.tensor_proto.string_val[0]
    again = TensorBoardTracker(tmp_path, first_step=20)
    again.log(30, metrics(train__loss=7.0))
    again.close()
    assert [(one.step, one.value) for one in written(tmp_path).Scalars("train/loss")] == [
        (10, 1.0),
        (20, 2.0),
        (30, 7.0),
    ]


def test_tensorboard_forgets_what_a_run_that_goes_back_does_again(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    for value, step in enumerate((10, 20, 30, 20, 30, 40)):
        tracker.log(step, metrics(train__loss=float(value)))
    tracker.close()
    found = written(tmp_path).Scalars("train/loss")
    assert [(one.step, one.value) for one in found] == [(10, 0.0), (20, 3.0), (30, 4.0), (40, 5.0)]


def test_a_missing_tensorboard_is_an_error_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    common: dict[str, Any] = {"rank": 1, "folder": None, "config": {}, "total_steps": 1, "wandb_project": "p"}
    with pytest.raises(
        ConfigError, match=r"telemetry.tensorboard is true but .*not installed.*dynmoe-ds\[tensorboard\]"
    ):
        build_trackers(**common, wandb_mode="disabled", tensorboard=True)
    assert build_trackers(**common, wandb_mode="disabled") == []


def test_rank_0_has_every_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: SimpleNamespace(define_metric=lambda *_, **__: None))
    trackers = build_trackers(
        rank=0,
        folder=RunFolder(tmp_path),
        config={},
        total_steps=1,
        wandb_mode="offline",
        wandb_project="p",
        detail="detailed",
        stream=io.StringIO(),
    )
    assert [type(tracker) for tracker in trackers] == [JsonLinesTracker, ConsoleTracker, WandbTracker]


class Kept:
    """A tracker that keeps what it gets."""

    def __init__(self, *_: Any) -> None:
        self.names: list[list[str]] = []
        self.events: list[Any] = []
        self.is_closed = False

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        self.names.append([metric.name for metric in metrics])

    def log_event(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("detail", "logged"),
    [
        ("brief", [["train/loss", "moe/live_experts/a"]]),
        ("detailed", [["train/loss", "moe/live_experts/a", "moe/mean_k/a"], ["moe/mean_k/a"]]),
    ],
)
def test_charts_are_of_one_tier_and_the_run_folder_has_everything(
    detail: Tier, logged: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charts = {"wandb": Kept(), "tensorboard": Kept()}
    monkeypatch.setattr(trackers, "WandbTracker", lambda *_: charts["wandb"])
    monkeypatch.setattr(trackers, "TensorBoardTracker", lambda *_: charts["tensorboard"])
    folder = RunFolder(tmp_path)
    found = build_trackers(
        rank=0, folder=folder, config={}, total_steps=2, wandb_mode="offline", wandb_project="p", tensorboard=True,
        detail=detail, stream=io.StringIO(),
    )  # fmt: skip
    of_layers = [Metric(name=f"moe/{name}/a", value=2.0, reduction="last") for name in ("live_experts", "mean_k")]
    for tracker in found:
        tracker.log(1, [*metrics(train__loss=1.0), *of_layers])
        tracker.log(2, of_layers[1:])
        tracker.log_event(event())
        tracker.close()
    for chart in charts.values():
        assert chart.names == logged
        assert chart.events == [event()] and chart.is_closed
    first, second = read_metrics(tmp_path)
    assert {"train/loss", "moe/live_experts/a", "moe/mean_k/a"} <= set(first) and "moe/mean_k/a" in second


def test_slow_packages_are_imported_only_when_used() -> None:
    code = "import sys, dynmoe_ds.telemetry; sys.exit(str({'wandb', 'matplotlib', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
