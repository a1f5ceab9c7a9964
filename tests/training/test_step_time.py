"""The parts of a step: worked examples on two ranks, and a run of which one rank is slow."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.telemetry import read_experts, read_metrics
from dynmoe_ds.training import Trainer
from dynmoe_ds.training.step_time import peak_memory_gib, step_time_metrics

CPU = torch.device("cpu")
PARTS = [f"train/{part}_time_s" for part in ("compute", "communication", "wait", "data")]
SLEEP_S = 0.3


def _worked(rank: int, world_size: int) -> list[dict[str, float]]:
    """Two steps in 10 s, of which rank 0 needs 9: see the test."""
    stalls = [
        {"communication": [3.0, 0.5, 1.0], "data": [0.5, 0.5]},
        {"communication": [1.0, 1.5, 1.0], "data": []},
    ][rank]
    uneven = {"communication": [[2.0, 1.0], [1.0]][rank], "data": []}
    elapsed_s = [9.0, 10.0][rank]
    return [
        {one.name: one.value for one in step_time_metrics(elapsed_s, 2, given, CPU, per_rank=per_rank)}
        for given, per_rank in ((stalls, True), (uneven, False), ({"communication": [], "data": []}, False))
    ]


def test_the_shortest_stall_is_communication_and_the_rest_is_waiting():
    first, second = run_ranks(_worked, 2)
    assert first == second
    told, uneven, nothing = first
    # The least of each collective: 1 + 0.5 + 1 s in two steps. Rank 0 waits 2 s in the first one and 1 s at the log
    # line, rank 1 one second in the second one: 2 s each in the mean. Data: 1 s and 0.
    assert told == pytest.approx(
        {
            "train/step_time_s": 5.0,
            "train/communication_time_s": 1.25,
            "train/wait_time_s": 1.0,
            "train/data_time_s": 0.25,
            "train/compute_time_s": 2.5,
            "train/compute_time_s/0": (9 - 4.5 - 1) / 2,
            "train/compute_time_s/1": (10 - 3.5) / 2,
        }
    )
    # Not as many on both ranks: as a whole, 1 of 3 and 1 s.
    assert uneven["train/communication_time_s"] == 0.5
    assert uneven["train/wait_time_s"] == pytest.approx((1.0 + 0.5) / 2)
    assert nothing["train/communication_time_s"] == 0 and nothing["train/wait_time_s"] == pytest.approx(0.25)


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    run = Trainer(config)
    if rank == 1:
        run.engine.module.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
    run.run()


def test_the_other_rank_waits_for_a_slow_one(tmp_path: Path):
    config = small_run(
        tmp_path / "run",
        parallel__num_ranks=2,
        parallel__ep_size=2,
        training__steps=4,
        training__log_every_steps=2,
        training__eval_every_steps=4,
        training__eval_sequences=2,
        training__sample_tokens=0,
        training__save_model=False,
        telemetry__detail="detailed",
        adaptation=None,
    )
    run_ranks(_train, 2, config)
    lines = read_metrics(config.run_dir)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert sum(line[part] for part in PARTS) == pytest.approx(line["train/step_time_s"], rel=1e-12)
        assert min(line[part] for part in PARTS) >= 0
        assert line["train/compute_time_s/1"] >= SLEEP_S
        # Both have as much else to do, however busy the machine is, so that nearly all of it is waited for.
        assert line["train/compute_time_s/1"] > line["train/compute_time_s/0"]
        assert line["train/wait_time_s"] > SLEEP_S / 4  # the mean of two ranks, one of which waits
        assert line["train/communication_time_s"] > 0 and line["train/data_time_s"] > 0
        assert line["moe/rank_imbalance"] == line["moe/rank_imbalance/model.layers.1.mlp"] >= 1
        assert line["train/peak_memory_gib"] > 0
    for line, experts in zip(lines, read_experts(config.run_dir), strict=True):
        (of_layer,) = experts["layers"].values()
        first, second = of_layer["rows_per_rank"]
        assert first + second == sum(of_layer["load"].values())
        assert line["moe/rank_imbalance"] == pytest.approx(max(first, second) / ((first + second) / 2))


def test_memory_of_a_process_on_a_cpu_is_what_the_kernel_says():
    ballast = torch.ones(2**26 // 4)  # 64 MiB
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    peak_kib = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")))
    assert peak_memory_gib(CPU) == pytest.approx(peak_kib / 2**20, rel=0.02)
    assert peak_memory_gib(CPU) > ballast.nbytes / 2**30
