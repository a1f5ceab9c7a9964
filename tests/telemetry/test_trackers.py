from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
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
    clock_time,
    short_list,
    short_number,
    spoken_time,
)
from tests.telemetry.events_for_tests import LAYER, event


def metrics(**values: float) -> list[Metric]:
    """Metrics by name with `__` for the slash."""
    return [Metric(name=name.replace("__", "/"), value=value, reduction="mean") for name, value in values.items()]


FULL = [
    *metrics(train__loss=3.4123, eval__loss=3.391, moe__mean_k=2.13, train__tokens_per_second=12345.0),
    Metric(name="moe/live_experts/a", value=6, reduction="last"),
    Metric(name="moe/live_experts/b", value=5, reduction="last"),
]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after `written`: a carriage return goes back and overwrites."""
    lines = [""]
    column = 0
    for character in written:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column] + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


class Clock:
    """Time that passes only when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_one_line_per_log_call_where_the_stream_is_no_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker(300, stream, clock)
    tracker.log(100, metrics(train__loss=4.0))
    clock.now += 4.6  # 0.23 s per step and 180 steps left: 41.4 s
    tracker.log(120, [*FULL, *metrics(train__step_time_s=0.2, train__compute_time_s=0.17)])
    tracker.close()
    assert stream.getvalue() == (
        "step  100/300  loss 4.000\n"
        "step  120/300  loss 3.412  held-out 3.391  k 2.13  experts 6 5  12.3k tok/s  compute 85%  eta 0:41\n"
    )


def test_the_first_estimate_comes_from_the_step_time_and_the_held_out_loss_stays() -> None:
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker(10, stream, clock)
    tracker.log(1, metrics(train__step_time_s=2.0, eval__loss=5.0))
    clock.now += 1
    tracker.log(2, metrics(train__loss=math.nan))
    assert (
        stream.getvalue() == "step   1/10  held-out 5.000  eta 0:18\nstep   2/10  loss nan  held-out 5.000  eta 0:08\n"
    )


def test_many_layers_are_summed_up() -> None:
    stream = io.StringIO()
    live = [Metric(name=f"moe/live_experts/{index}", value=3 + index, reduction="last") for index in range(9)]
    ConsoleTracker(10, stream).log(10, live)
    assert stream.getvalue() == "step  10/10  experts 3..11 in 9 layers\n"


def test_a_terminal_sees_one_line_rewritten_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    tracker = ConsoleTracker(300, stream, Clock())
    tracker.log(1, metrics(train__loss=1e15))
    tracker.log(2, metrics(train__loss=4.0))
    assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 2
    assert screen(stream.getvalue()) == ["step    2/300  loss 4.000  eta 0:00"]
    tracker.log_event(event())
    assert screen(stream.getvalue())[1:] == ["step    2/300  loss 4.000  eta 0:00"]
    tracker.log(3, metrics(train__loss=3.0))
    tracker.close()
    tracker.close()
    assert screen(stream.getvalue()) == [
        f"step 60: layer {LAYER} grew expert 4 (copy_nearest of 2), pruned 1 -> 5 live of 16 slots",
        "step    3/300  loss 3.000  eta 0:00",
        "",
    ]


def test_a_line_longer_than_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    ConsoleTracker(300, stream).log(120, FULL)
    assert screen(stream.getvalue()) == ["step  120/300  loss"]


def test_without_a_stream_lines_go_to_logging(caplog: pytest.LogCaptureFixture) -> None:
    tracker = ConsoleTracker(10)
    with caplog.at_level(logging.INFO):
        tracker.log(5, metrics(train__loss=1.0))
        tracker.log_event(event(5))
        tracker.close()
    assert [record.message for record in caplog.records] == [
        "step   5/10  loss 1.000",
        f"step 5: layer {LAYER} grew expert 4 (copy_nearest of 2), pruned 1 -> 5 live of 16 slots",
    ]
    assert {record.name for record in caplog.records} == {"dynmoe_ds.telemetry.trackers"}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            event(pruned=[], grown=[], moved=[{"expert_id": 3, "from_slot": 1, "to_slot": 9}]),
            [f"step 60: layer {LAYER} moved expert 3 from slot 1 to 9 -> 5 live of 16 slots"],
        ),
        (
            event(pruned=[1, 2], grown=[{"expert_id": 7, "slot": 1, "rank": 0, "parent_id": None, "seeding": "fresh"}]),
            [f"step 60: layer {LAYER} grew expert 7 (fresh), pruned 1 2 -> 5 live of 16 slots"],
        ),
        (
            event(
                pruned=[],
                grown=[
                    {"expert_id": 7, "slot": 1, "rank": 0, "parent_id": 2, "seeding": "copy_nearest"},
                    {"expert_id": 8, "slot": 4, "rank": 1, "parent_id": None, "seeding": "mean"},
                    {"expert_id": 9, "slot": 5, "rank": 1, "parent_id": 7, "seeding": "split"},
                ],
            ),
            [
                f"step 60: layer {LAYER} grew expert 7 (copy_nearest of 2), expert 8 (mean), expert 9 (split of 7) "
                "-> 5 live of 16 slots"
            ],
        ),
        (event(pruned=[], grown=[]), []),
        (
            event(pruned=[], grown=[], live_after=5, num_slots_before=24),
            [f"step 60: layer {LAYER} pool resized from 24 slots -> 5 live of 16 slots"],
        ),
        (event(pruned=[], grown=[], num_slots_before=16), []),
        (
            event(pruned=[], grown=[], live_after=16, out_of_slots=True, warnings=("k is high",)),
            [
                f"step 60: layer {LAYER} is out of slots: 16 of 16 are live, so no further expert could be added. "
                "Raise model.num_slots, use adaptation.pool=elastic, end growth earlier "
                "(adaptation.last_growth_step), or prune more (adaptation.prune_below_share).",
            ],
        ),
    ],
)
def test_events_in_words(told: dict[str, Any], expected: list[str]) -> None:
    stream = io.StringIO()
    ConsoleTracker(300, stream).log_event(told)
    assert stream.getvalue().splitlines() == expected


def test_json_lines_tracker_writes_the_run_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    tracker = JsonLinesTracker(folder)
    tracker.log(5, metrics(train__loss=3.0, moe__mean_k=math.nan))
    tracker.log_event(event())
    tracker.close()
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 5 and line["train/loss"] == 3.0 and line["moe/mean_k"] is None
    assert read_adaptation(tmp_path) == [event()]


def test_wandb_offline_fills_the_run_folder_and_talks_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker = WandbTracker(tmp_path, {"seed": 1}, "project", "offline")
        tracker.log(60, metrics(train__loss=math.nan, moe__mean_k=1.5))
        tracker.log_event(event())
        tracker.log(30, metrics(train__loss=2.0))  # out of order
        tracker.close()
        tracker.close()
        with pytest.raises(BlockingIOError):
            server.accept()
    assert "wandb failed" not in caplog.text
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (recorded,) = run.glob("run-*.wandb")
    deadline = time.monotonic() + 30
    while b"train/loss" not in recorded.read_bytes():  # wandb's own process writes the file soon after `finish`
        assert time.monotonic() < deadline, recorded.read_bytes()
        time.sleep(0.1)
    assert b"seed" in recorded.read_bytes()
    (table,) = run.rglob("*.table.json")
    assert "grew expert 4 (copy_nearest of 2)" in json.loads(table.read_text())["data"][0][1]


def wandb_records(file: Path) -> Iterator[Any]:
    """What a .wandb file holds: after 7 bytes LevelDB's log, in blocks of 32 KiB, of parts with a head of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    written, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(written):
        if (left := 2**15 - at % 2**15) < 7:  # too little for a part's head
            at += left
            continue
        length, kind = struct.unpack_from("<HB", written, at + 4)
        record += written[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield Record.FromString(record)
            record = b""


def records_when_written(file: Path) -> list[Any]:
    """The records, with those of a run and of its history: on a busy machine they come some time after the end."""
    deadline = time.monotonic() + 30
    while True:
        found = list(wandb_records(file))
        is_whole = all(any(one.HasField(kind) for one in found) for kind in ("run", "history"))
        if is_whole or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def test_two_starts_offline_are_two_parts_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run_dir = tmp_path / "rates" / "0"
    run_dir.mkdir(parents=True)
    (tmp_path / "rates" / "sweep.tsv").write_text("run\tseed\n0\t1\n")
    for step in (1, 2):
        tracker = WandbTracker(run_dir, {"seed": 1}, "project", "offline")
        tracker.log(step, metrics(train__loss=float(step)))
        tracker.close()
        time.sleep(2 - step)  # parts are named by the second
    parts = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == 2, "wandb does not go on in the first one"
    run_id = (run_dir / "wandb" / "run_id").read_text()
    for step, part in enumerate(parts, 1):
        found = records_when_written(part / f"run-{run_id}.wandb")
        (run,) = (record.run for record in found if record.HasField("run"))
        assert (run.run_id, run.run_group, run.display_name, run.project) == (run_id, "rates", "0", "project")
        assert run.resume, "so that `wandb sync` asks the server where the part before has ended"
        assert {(one.key, one.value_json) for one in run.config.update} > {("seed", "1"), ("slurm_job_id", '"77"')}
        (logged,) = (record.history for record in found if record.HasField("history"))
        values = {one.nested_key[0]: one.value_json for one in logged.item}
        assert (values["step"], values["train/loss"]) == (f"{step}", f"{step}")


def test_wandb_goes_on_in_the_same_run_of_the_same_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **options: given.append(options) or FailingRun())
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    runs, stage = tmp_path / "runs", {"stage": {"has_experts": True}}
    for name, config in (
        ("a", {}),
        ("a", {}),
        ("b", {}),
        ("1_language", stage),
        ("1_language", {}),
        ("language", stage),
    ):
        WandbTracker(runs / name, config, "project", "offline")
    assert given[0]["id"] == given[1]["id"] != given[2]["id"] and len(given[0]["id"]) == 16
    assert [options["name"] for options in given[:3]] == ["a", "a", "b"]
    assert {options["resume"] for options in given} == {"allow"}
    settings = given[0]["settings"]
    assert (settings.init_timeout, settings.finish_timeout, settings.finish_timeout_raises) == (60, 60, True)
    assert [options["group"] for options in given] == ["a", "a", "b", "runs", "1_language", "language"]
    (runs / "sweep.tsv").write_text("run\tseed\n")
    WandbTracker(runs / "a", {}, "project", "offline")
    assert given[-1]["group"] == "runs" and given[-1]["config"] == {}


_ONLINE = """
import logging, os, sys
from pathlib import Path
from dynmoe_ds.telemetry import Metric, RunFolder, build_trackers, trackers
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
trackers.WANDB_INIT_TIMEOUT_S = 1
for key in ({}, {"WANDB_API_KEY": "a" * 40}):
    os.environ.update(key)
    folder = RunFolder(Path(sys.argv[1]) / f"{len(key)}")
    common = {"rank": 0, "config": {}, "total_steps": 2, "wandb_project": "p", "stream": sys.stdout}
    made = build_trackers(folder=folder, wandb_mode="online", **common)
    for step in (1, 2):
        for tracker in made:
            tracker.log(step, [Metric(name="train/loss", value=1.0, reduction="mean")])
    for tracker in made:
        tracker.close()
"""


def test_online_without_a_key_or_without_an_answer_is_one_warning(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own |= {"HOME": f"{tmp_path}", "NETRC": f"{tmp_path}/none", "WANDB_BASE_URL": nobody}
    command = [sys.executable, "-c", _ONLINE, f"{tmp_path}"]
    done = subprocess.run(
        command, env=own, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=True
    )
    no_key, no_answer = [line for line in done.stderr.splitlines() if line.startswith("WARNING ")]
    assert no_key.startswith("WARNING wandb failed while starting (UsageError: No API key configured.")
    assert no_answer.startswith("WARNING wandb failed while starting (CommError: ")
    for number, warning in enumerate((no_key, no_answer)):
        assert warning.endswith("). Training goes on without it; the run folder still gets every number.")
        assert [line["train/loss"] for line in read_metrics(tmp_path / f"{number}")] == [1.0, 1.0]
    assert done.stdout.count("step  2/2  loss 1.000") == 2, "the progress lines"


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


def test_a_missing_tensorboard_is_an_error_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    common: dict[str, Any] = {"rank": 1, "folder": None, "config": {}, "total_steps": 1, "wandb_project": "p"}
    with pytest.raises(
        ConfigError, match=r"telemetry.tensorboard is true but .*not installed.*dynmoe-ds\[tensorboard\]"
    ):
        build_trackers(**common, wandb_mode="disabled", tensorboard=True)
    assert build_trackers(**common, wandb_mode="disabled") == []


class FailingRun:
    """A wandb run whose every call fails."""

    def __init__(self) -> None:
        self.num_calls = 0

    def define_metric(self, *_: Any, **__: Any) -> None:
        """Works."""

    def log(self, *_: Any, **__: Any) -> None:
        self.num_calls += 1
        raise OSError("disk full")

    finish = log


def test_a_wandb_failure_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    run = FailingRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = WandbTracker(tmp_path, {}, "project", "offline")
    for step in (1, 2):
        tracker.log(step, metrics(train__loss=1.0))
        tracker.log_event(event())
    tracker.close()
    assert run.num_calls == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "wandb failed while logging (OSError: disk full). Training goes on without it" in record.message


@pytest.mark.parametrize("fails_in", ["starting", "making a table", "finishing"])
def test_wandb_may_fail_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_in: str
) -> None:
    import wandb

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    run = FailingRun()
    monkeypatch.setattr(run, "log", lambda *_, **__: None)
    monkeypatch.setattr(wandb, "init", fail if fails_in == "starting" else lambda **_: run)
    if fails_in == "making a table":
        monkeypatch.setattr(wandb, "Table", fail)
    tracker = WandbTracker(tmp_path, {}, "project", "online")
    tracker.log_event(event())
    tracker.close()
    (record,) = caplog.records
    assert f"wandb failed while {fails_in}" in record.message


def hide_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_wandb_is_an_error_on_every_rank_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any, rank: int
) -> None:
    hide_wandb(monkeypatch)
    folder = RunFolder(tmp_path) if rank == 0 else None
    common: dict[str, Any] = {"rank": rank, "folder": folder, "config": {}, "total_steps": 1, "wandb_project": "p"}
    with pytest.raises(ConfigError, match=rf"wandb_mode is {mode} but .*not installed. Run `pip install wandb`"):
        build_trackers(**common, wandb_mode=mode)
    assert len(build_trackers(**common, wandb_mode="disabled")) == (2 if rank == 0 else 0)


def test_an_unknown_wandb_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"telemetry.wandb_mode is 'on'. Use offline, online or disabled"):
        WandbTracker(tmp_path, {}, "project", "on")  # type: ignore[arg-type]


def test_rank_0_has_every_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: FailingRun())
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


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (850.4, "850"), (12345, "12.3k"), (1_200_000, "1.2M"), (3e9, "3.0G")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (41, "0:41"), (3661, "1:01:01")])
def test_clock_times(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (41, "41 s"), (3661, "1 h 1 min"), (360000, "100 h 0 min")]
)
def test_spoken_times(seconds: float, text: str) -> None:
    assert spoken_time(seconds) == text


def test_short_lists() -> None:
    assert short_list([], "layers") == "" and short_list([7, 6, 9, 6], "layers") == "7, 6, 9, 6"
    assert short_list([7, 6, 9, 4, 6], "layers") == "4 to 9 in 5 layers"


def test_a_terminal_that_was_closed_does_not_end_the_training() -> None:
    class Closed(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    tracker = ConsoleTracker(300, Closed())
    tracker.log(120, FULL)
    tracker.log(130, FULL)
    tracker.close()
