"""What a fault campaign takes for a difference, and that a victim which has just ended does not end the campaign."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.faults import campaign


def write_run(folder: Path, steps: list[int], load: int = 7, loss: float = 1.0) -> Path:
    (folder / "model").mkdir(parents=True)
    for name in ("model/model.safetensors", "sample.txt", "adaptation.jsonl"):
        (folder / name).write_text("")
    metrics = [{"step": step, "time_s": 0.1, "train/loss": loss, "eval/loss": 2.0} for step in steps]
    experts = [{"step": step, "layers": {"moe": {"load": {"0": load}}}} for step in steps]
    for name, lines in (("metrics.jsonl", metrics), ("experts.jsonl", experts)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_loads_are_compared_where_they_cover_the_same_steps(tmp_path: Path) -> None:
    undisturbed = write_run(tmp_path / "undisturbed", [4, 8, 12])
    assert campaign.differences(write_run(tmp_path / "same", [4, 8, 12]), undisturbed) == []
    other = write_run(tmp_path / "other", [4, 8, 12], load=8)
    assert campaign.differences(other, undisturbed) == [f"experts.jsonl at step {step}" for step in (4, 8, 12)]
    stopped = write_run(tmp_path / "stopped", [4, 6, 8, 12], load=8)
    assert campaign.differences(stopped, undisturbed) == [f"experts.jsonl at step {step}" for step in (4, 12)]


def test_lines_that_are_missing_are_named(tmp_path: Path) -> None:
    undisturbed = write_run(tmp_path / "undisturbed", [4, 8, 12])
    found = campaign.differences(write_run(tmp_path / "shorter", [4, 8]), undisturbed)
    assert found == ["metrics.jsonl lacks steps [12]", "experts.jsonl lacks steps [12]"]


def test_a_victim_that_has_just_ended_is_no_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    class Gone:
        def send_signal(self, number: int) -> None:
            raise psutil.NoSuchProcess(1)

    class Attempt:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def wait_for(self, moment: str, delay_s: float) -> bool:
            return True

        def members(self) -> dict[str, Any]:
            return dict.fromkeys(("rank 0", "rank 1", "launcher", "command"), Gone())

        def end(self) -> tuple[int, float, int]:
            ended.append("attempt")
            return 0, 0.0, 0

    monkeypatch.setattr(campaign, "Attempt", Attempt)
    monkeypatch.setattr(campaign, "finish", lambda folder: ended.append("run"))
    kills = list(campaign.run_and_kill(tmp_path, 1, 2, 1.0, random.Random(0)))
    assert kills == [] and ended == ["attempt", "attempt", "run"]
