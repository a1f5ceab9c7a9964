from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.telemetry.run_folder import RunFolder, read_metrics
from dynmoe_ds.telemetry.trackers import (
    WandbTracker,
    build_trackers,
)
from tests.helpers.spawn import free_port
from tests.telemetry.events_for_tests import event
from tests.telemetry.metrics_for_tests import metrics


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
        if at + 7 + length > len(written):  # wandb is still writing it
            return
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
        assert {(one.key, one.value_json) for one in run.config.update} >= {("seed", "1"), ("slurm_job_id", '"77"')}
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
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own |= {"HOME": f"{tmp_path}", "NETRC": f"{tmp_path}/none", "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
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
