from __future__ import annotations

import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.telemetry import run_folder
from dynmoe_ds.telemetry.run_folder import RunFolder, collect_versions, read_adaptation, read_experts, read_metrics
from tests.telemetry.events_for_tests import LAYER, event


def test_the_files_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.write_config("seed: 1\n")
    folder.write_versions()
    folder.write_sample("some text")
    folder.append_metrics(5, {"train/loss": 3.5}, time_s=1.25)
    folder.append_experts(5, {LAYER: {"load": {0: 12, 3: 0}, "num_tokens": 16, "num_unrouted": 4}})
    folder.append_adaptation(event())
    folder.close()
    folder.close()
    path = folder.path
    assert (path / "config.yaml").read_text() == "seed: 1\n"
    assert (path / "sample.txt").read_text() == "some text"
    assert (path / "metrics.jsonl").read_text() == '{"step": 5, "time_s": 1.25, "train/loss": 3.5}\n'
    assert read_metrics(path) == [{"step": 5, "time_s": 1.25, "train/loss": 3.5}]
    assert read_experts(path) == [
        {"step": 5, "layers": {LAYER: {"load": {"0": 12, "3": 0}, "num_tokens": 16, "num_unrouted": 4}}}
    ]
    assert read_adaptation(path) == [event()]


def test_versions_name_everything_that_shapes_the_result(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_versions()
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert set(versions) == {
        "python", "torch", "deepspeed", "transformers", "dynmoe_ds", "platform", "git_commit", "git_has_changes"
    }  # fmt: skip
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["platform"] == platform.platform()


def test_a_package_that_is_not_installed_has_version_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run_folder.PACKAGES, "torch", "no-such-distribution-dynmoe")
    assert collect_versions()["torch"] is None


def test_the_git_commit_is_of_the_checkout_and_of_nothing_above_it(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("")
    assert run_folder._git_state(tmp_path / "package") == (None, None)
    commands = "git init -q . && git add . && git -c user.name=n -c user.email=e commit -qm m"
    subprocess.run(commands, shell=True, cwd=tmp_path, check=True)
    commit, has_changes = run_folder._git_state(tmp_path / "package")
    assert commit is not None and len(commit) == 40 and has_changes is False
    (tmp_path / "package" / "a.py").write_text("1")
    assert run_folder._git_state(tmp_path / "package") == (commit, True)
    (tmp_path / "venv" / "package").mkdir(parents=True)
    assert run_folder._git_state(tmp_path / "venv" / "package") == (None, None)


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics(1, {"train/loss": math.nan, "eval/loss": -math.inf, "moe/mean_k": 1.5}, time_s=0.0)
    folder.append_adaptation(event(mean_k=math.inf))
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "adaptation.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert read_metrics(tmp_path)[0]["train/loss"] is None
    assert read_metrics(tmp_path)[0]["eval/loss"] is None
    assert read_metrics(tmp_path)[0]["moe/mean_k"] == 1.5
    assert read_adaptation(tmp_path)[0]["layers"][LAYER]["mean_k"] is None


WRITER_THAT_NEVER_CLOSES = """
import sys, time
from dynmoe_ds.telemetry.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
for step in (1, 2, 3):
    folder.append_metrics(step, {"train/loss": 1.0})
sys.stdout.write("written\\n"); sys.stdout.flush()
time.sleep(60)
"""


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER_THAT_NEVER_CLOSES, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_readers_skip_a_half_written_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "time_s": 0.5}\n'
    path.write_text(whole + '{"step": 2, "tim')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    path.write_text(whole + '{"step": 2, "time_s": 1}')  # whole but for its line end
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    path.write_text('{"step": 1, "ti\n' + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: not JSON .*Remove or repair that line"):
        read_metrics(tmp_path)
    path.write_text(whole + '{"step": 2, "ti\n')  # the line end shows that it was not cut short
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("metrics", "[1]", "not an object"),
        ("metrics", '{"time_s": 1}', "no integer `step`"),
        ("metrics", '{"step": 1}', "no number `time_s`"),
        ("metrics", '{"step": 1, "time_s": 1, "train/loss": "low"}', "train/loss is 'low', not a number"),
        ("experts", '{"step": 1}', "no object `layers`"),
        ("experts", '{"step": 1, "layers": {"a": {"load": {}}}}', "layer a lacks num_tokens, num_unrouted"),
        ("adaptation", '{"step": 1, "rule": "paper"}', "the event lacks window_steps, layers, warnings"),
        (
            "adaptation",
            '{"step": 1, "rule": "paper", "window_steps": 1, "warnings": [], "layers": []}',
            "the event's `layers` is not an object",
        ),
        (
            "adaptation",
            '{"step": 1, "rule": "paper", "window_steps": 1, "warnings": [], "layers": {"a": {"pruned": []}}}',
            "the event's layer a lacks grown, moved",
        ),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(tmp_path: Path, name: str, line: str, fault: str) -> None:
    good = {
        "metrics": {"step": 1, "time_s": 0.5},
        "experts": {"step": 1, "layers": {}},
        "adaptation": event(),
    }[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    reader = {"metrics": read_metrics, "experts": read_experts, "adaptation": read_adaptation}[name]
    with pytest.raises(DataError) as raised:
        reader(tmp_path)
    assert f"{tmp_path / name}.jsonl, line 2: {fault}" in str(raised.value)


def test_a_missing_file_reads_as_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == read_experts(tmp_path) == read_adaptation(tmp_path) == []


def test_opening_again_appends_after_dropping_a_half_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics(1, {}, time_s=100.0)
    folder.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "ti')
    (tmp_path / "experts.jsonl").write_text('{"step": 1, "layers": {}}')  # whole but for its line end
    with caplog.at_level(logging.WARNING):
        again = RunFolder(tmp_path)
    assert "metrics.jsonl ended in a half-written line of 15 bytes" in caplog.text
    assert "experts.jsonl" not in caplog.text
    again.append_metrics(2, {})
    again.append_experts(2, {})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert [line["step"] for line in read_experts(tmp_path)] == [1, 2]
    assert 100.0 <= read_metrics(tmp_path)[1]["time_s"] < 130.0  # the clock goes on


def test_time_is_seconds_since_the_folder_was_opened(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    time.sleep(0.05)
    folder.append_metrics(1, {})
    assert 0.04 < read_metrics(tmp_path)[0]["time_s"] < 10


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (10, 20, 30):
        folder.append_metrics(step, {"train/loss": 1.0})
        folder.append_experts(step, {})
        folder.append_adaptation(event(step))
    folder.rewind(20)
    folder.append_metrics(21, {"train/loss": 2.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 21]
    assert [line["step"] for line in read_experts(tmp_path)] == [10, 20]
    assert [line["step"] for line in read_adaptation(tmp_path)] == [10, 20]
    assert read_adaptation(tmp_path)[1] == event(20)
    assert sorted(os.listdir(tmp_path)) == ["adaptation.jsonl", "experts.jsonl", "metrics.jsonl"]


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir is .*file, which is a file. Give the path of a folder"):
        RunFolder(tmp_path / "file")
