"""The main job through the real deepspeed launcher, as a user types it."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.command import ROOT, dynmoe, environment
from tests.helpers.saved_model import saved_model_loss

SHORTER = [
    "training.steps=60",
    "training.eval_every_steps=20",
    "training.eval_sequences=16",
    "training.micro_batch_size=4",
    "training.sample_tokens=20",
    "optim.warmup_steps=10",
    "adaptation.every_steps=10",
    "adaptation.window_steps=5",
    "adaptation.last_growth_step=60",
]


def run(command: list[str], timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    result = run(dynmoe("train", "experiment=demo", f"run_dir={folder}", *SHORTER))
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, result


@pytest.mark.launcher
def test_held_out_loss_falls(demo: Any) -> None:
    losses = [line["eval/loss"] for line in lines(demo[0] / "metrics.jsonl") if "eval/loss" in line]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < math.log(1024) - 1  # a model that knows nothing is at the logarithm of the vocabulary


@pytest.mark.launcher
def test_every_adaptation_is_logged_and_experts_are_born(demo: Any) -> None:
    events = lines(demo[0] / "adaptation.jsonl")
    assert [event["step"] for event in events] == [10, 20, 30, 40, 50, 60]
    layers = {"model.layers.1.mlp", "model.layers.3.mlp"}
    assert all(set(event["layers"]) == layers for event in events)
    # Every step of the window counts the tokens of both ranks: 5 steps x 2 ranks x 4 sequences x 128 tokens.
    assert all(change["num_tokens"] == 5 * 2 * 4 * 128 for event in events for change in event["layers"].values())
    born = [grown for event in events for change in event["layers"].values() for grown in change["grown"]]
    assert born and all(expert["expert_id"] >= 4 for expert in born)


@pytest.mark.launcher
def test_the_progress_line_says_what_a_user_wants_to_know(demo: Any) -> None:
    output = demo[1].stdout + demo[1].stderr
    last = [line for line in output.splitlines() if line.lstrip().startswith("step") and "60/60" in line][-1]
    for word in ("loss", "held-out", " k ", "experts", "tok/s"):
        assert word in last, (word, last)
    assert "grew expert" in output


@pytest.mark.launcher
def test_the_run_folder_is_complete(demo: Any) -> None:
    folder = demo[0]
    page = (folder / "report.html").read_text()
    for heading in ("Loss", "Live experts", "Experts per token", "Load of the experts", "Generated sample"):
        assert heading in page, heading
    assert page.count("data:image/png;base64,") >= 6
    assert "num_slots: 16" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "versions.json").read_text())["deepspeed"].startswith("0.19")
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert (folder / "sample.txt").read_text().startswith("The ")
    assert (folder / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.launcher
def test_the_saved_model_is_the_trained_one(demo: Any) -> None:
    (*_, last) = (line["eval/loss"] for line in lines(demo[0] / "metrics.jsonl") if "eval/loss" in line)
    assert saved_model_loss(demo[0]) == pytest.approx(last, abs=1e-4)


@pytest.mark.launcher
def test_no_rank_is_left_behind(demo: Any) -> None:
    mine = str(demo[0])
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if mine in " ".join(p.info["cmdline"] or [])]


@pytest.mark.launcher
def test_the_launch_script_runs_the_same_job(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(["launch/local.sh", "experiment=smoke", f"run_dir={folder}", "telemetry=disabled"])
    assert result.returncode == 0, result.stderr[-4000:]
    assert (folder / "report.html").is_file()
    assert lines(folder / "metrics.jsonl")[-1]["step"] == 30
    assert not (folder / "model").exists(), "the smoke test keeps no model"


@pytest.mark.launcher
def test_faults_are_all_named_before_any_rank_starts(tmp_path: Path) -> None:
    command = dynmoe("train", "experiment=demo", f"run_dir={tmp_path / 'never'}")
    result = run([*command, "trainng.steps=5", "parallel.ep_size=3", "optim.lr=-1"], timeout_s=60)
    assert result.returncode == 2
    for words in ("3 faults", "trainng", "Did you mean 'training'", "parallel.ep_size is 3", "optim.lr is -1"):
        assert words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "never").exists()
