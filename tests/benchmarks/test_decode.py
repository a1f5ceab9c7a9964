"""Decoding steps side by side: that the comparison runs, of layers that are in evaluation and keep nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynmoe_ds as dm
from benchmarks.decode import decoding
from benchmarks.layer.candidates import Candidate

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_every_candidate_runs_and_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.decode", "--quick", "--output", f"{tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads((tmp_path / "decode.json").read_text())["cells"]
    assert [(cell["dtype"], cell["tokens"]) for cell in cells] == [
        ("float32", 1), ("float32", 8), ("bfloat16", 1), ("bfloat16", 8),
    ]  # fmt: skip
    for cell in cells:
        assert cell["left_out"] == {} and len(cell["seconds"]) == 12
        assert all(0 < of["least"] <= of["median"] for of in cell["seconds"].values())
        assert all(1.8 < k < 2.6 for k in cell["mean_k"].values())
    page = (tmp_path / "decode.md").read_text()
    assert all(page.count(f"| {name} |") == 1 for name in cells[0]["seconds"])
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_beyond_the_calibrated_ones_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.decode", "--tokens", "1", "129"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "must be between 1 and 128" in done.stderr


def test_a_step_is_inference_of_every_batch() -> None:
    layer = dm.MoELayer(hidden_size=16, ffn_hidden_size=8, num_experts=4, num_slots=4, router="top_any")
    seen: list[tuple[int, bool, bool, bool]] = []
    layer.register_forward_hook(
        lambda module, args, y: seen.append(
            (int(args[0][0, 0]), module.training, torch.is_inference_mode_enabled(), y.requires_grad)
        )
    )
    batches = [torch.full((2, 16), float(number)) for number in range(3)]
    step = decoding("ours: top_any", Candidate(run=lambda x: pytest.fail("with losses"), module=layer), batches)
    assert step()["batch"] > 0
    assert seen == [(number, False, True, False) for number in range(3)]
