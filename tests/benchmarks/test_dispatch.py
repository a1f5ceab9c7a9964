"""Bytes between ranks, counted as a person would count them, and the methods that send them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.dispatch import METHODS, BytesOnTheWire, Cell, draw, draw_routing, least_rows
from benchmarks.side_by_side import RankFailed, run_ranks

ROOT = Path(__file__).parents[2]
QUICK_CELLS = [Cell(num_experts=8, k=k, routing=r) for r in ("uniform", "skewed") for k in (1, 3)]


def pairs_between_ranks(cell: Cell, num_ranks: int) -> tuple[int, int]:
    """Of the routings that `--quick` draws: chosen (token, expert) and (token, rank) pairs with an expert elsewhere."""
    experts, ranks = 0, 0
    per_rank = cell.num_experts // num_ranks
    for rank in range(num_ranks):
        mask, _ = draw_routing(cell, 64, seed=1000 + rank)
        for row in mask.tolist():
            elsewhere = [e // per_rank for e, chosen in enumerate(row) if chosen and e // per_rank != rank]
            experts += len(elsewhere)
            ranks += len(set(elsewhere))
    return experts, ranks


@pytest.mark.timeout(600)
def test_every_method_runs_and_its_bytes_are_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.dispatch", "--quick", "--output", f"{tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "dispatch.json").read_text())["cells"]
    assert [(cell["ranks"], cell["k"], cell["routing"]) for cell in found] == [
        (size, cell.k, cell.routing) for size in (2, 4) for cell in QUICK_CELLS
    ]
    for got, cell in zip(found, 2 * QUICK_CELLS, strict=True):
        experts, ranks = pairs_between_ranks(cell, got["ranks"])
        assert got["least_bytes"] == 4 * ranks * 32 * 4, "there, back, and both again, 32 float32 numbers a row"
        assert list(got["methods"]) == list(METHODS)
        per_expert = got["methods"]["per expert"]
        for one in ("forward", "backward"):
            assert per_expert[one]["row_bytes"] == 2 * experts * 32 * 4
        # Weights go with the rows and their gradients come back; counts (int64) of all experts elsewhere go once.
        counts = got["ranks"] * (got["ranks"] - 1) * 8 * (8 // got["ranks"])
        assert per_expert["forward"]["metadata_bytes"] == 4 * experts + counts
        assert per_expert["backward"]["metadata_bytes"] == 4 * experts
        for method in METHODS:
            sent = sum(got["methods"][method][one]["row_bytes"] for one in ("forward", "backward"))
            assert got["least_bytes"] <= sent, method
            assert got["methods"][method]["seconds"]["forward + backward"]["least"] > 0
    page = (tmp_path / "dispatch.md").read_text()
    assert "## 2 ranks" in page and page.count("| 8 | skewed |") == 4
    for name in ("dispatch.png", "dispatch_time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_point_is_inside_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of many ranks on few cores are many times those of two."""
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)

    def cell(ranks: int, k: int) -> dict[str, Any]:
        method = {
            "forward": {"row_bytes": 8 * k, "metadata_bytes": 1}, "backward": {"row_bytes": 8 * k, "metadata_bytes": 1},
            "seconds": {"forward + backward": {"least": 0.01 * ranks**2 * k}},
        }  # fmt: skip
        return {
            "ranks": ranks, "num_experts": 8, "k": k, "routing": "uniform", "least_bytes": 8,
            "methods": dict.fromkeys(METHODS, method),
        }  # fmt: skip

    draw([cell(ranks, k) for ranks in (2, 8) for k in (1, 4)], tmp_path)
    monkeypatch.undo()
    for figure in figures:
        for axis in figure.axes:
            low, high = axis.get_ylim()
            assert all(low <= y <= high for line in axis.lines[: len(METHODS)] for y in line.get_ydata())
        plt.close(figure)
    assert len(figures) == 2


def test_experts_that_cannot_be_shared_out_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.dispatch", "--ranks", "2", "3", "--experts", "16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "16 experts cannot be shared out evenly among 3 ranks. Use a multiple." in done.stderr


def send_by_hand() -> tuple[dict[str, int], dict[str, int], float]:
    """Sends, on 3 ranks with rows of 4 numbers, what the test below counts by hand."""
    rank = dist.get_rank()
    with BytesOnTheWire(hidden_size=4) as counted:
        # Forward: 1 row to rank 0, 2 to rank 1, 3 to rank 2, in float32; then one int64 number to each.
        got = torch.empty(3 * (rank + 1), 4)
        dist.all_to_all_single(got, torch.full((6, 4), float(rank)), [rank + 1] * 3, [1, 2, 3])
        dist.all_to_all_single(torch.empty(3, dtype=torch.int64), torch.arange(3))
        counted.passing = "backward"
        # Backward: 2 rows in bfloat16 to each, by equal splits; an int64 [*, 4] and a float [*, 3] are no rows.
        dist.all_to_all_single(torch.empty(6, 4, dtype=torch.bfloat16), torch.ones(6, 4, dtype=torch.bfloat16))
        dist.all_to_all_single(torch.empty(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64))
        dist.all_to_all_single(torch.empty(3, 3), torch.ones(3, 3))
        dist.all_to_all_single(torch.empty(0, 4), torch.ones(0, 4), [0] * 3, [0] * 3)
    dist.all_to_all_single(torch.empty(3, 4), torch.ones(3, 4))  # outside: not counted
    return counted.rows, counted.metadata, got.sum().item()


def test_bytes_are_those_a_person_counts() -> None:
    for rank, (rows, metadata, total) in enumerate(run_ranks(send_by_hand, 3, timeout_s=120)):
        assert rows == {"forward": (6 - (rank + 1)) * 4 * 4, "backward": 2 * 2 * 4 * 2}
        assert metadata == {"forward": 2 * 8, "backward": 2 * 4 * 8 + 2 * 3 * 4}
        assert total == 4 * (rank + 1) * (0 + 1 + 2), "what was sent has come"


def send_by_lists() -> None:
    with BytesOnTheWire(hidden_size=4):
        dist.all_to_all([torch.empty(1)], [torch.ones(1)])


def test_bytes_that_would_not_be_counted_are_refused() -> None:
    with pytest.raises(RankFailed, match="all_to_all was called, whose bytes are not counted"):
        run_ranks(send_by_lists, 1, timeout_s=120)


def test_rows_that_must_travel() -> None:
    # Experts 0 and 1 are on rank 0, 2 and 3 on rank 1.
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    assert least_rows(mask, 2, 0) == 2 and least_rows(mask, 2, 1) == 2
    assert least_rows(mask, 4, 0) == 1 + 2 + 0 + 1


def test_routings_have_the_mean_k_that_is_asked_for() -> None:
    mask, weights = draw_routing(Cell(num_experts=16, k=2, routing="skewed"), 20_000, seed=0)
    shares = mask.double().mean(0)
    assert shares.sum().item() == pytest.approx(2, abs=0.05) and shares[0].item() == pytest.approx(0.5, abs=0.02)
    assert weights.requires_grad and not weights[~mask].any()
    sums = weights.sum(1)
    torch.testing.assert_close(sums, mask.any(1).float())
