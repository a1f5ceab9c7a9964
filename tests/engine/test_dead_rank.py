"""A rank that dies or hangs: the others end with an error within the time that was configured, wherever they wait."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import dynmoe_ds as dm
from dynmoe_ds.checkpoint import store
from dynmoe_ds.checkpoint.writer import SAVE_PATIENCE
from dynmoe_ds.distributed import all_to_all, describe_lost_rank, expert_parallel_group
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import free_port, run_ranks, start_rank

TIMEOUT_S = 5
# Beyond what is configured: a busy machine, and ranks that began to wait later than the first.
MARGIN_S = 20

Moment = Callable[[], None]


def in_forward(engine: Any, die: Moment) -> None:
    """Before the counts of the dispatch; with EP 1 where they would be."""
    if engine.module.moe[0].ep_size > 1:
        _before(all_to_all.dist, "all_to_all_single", die)
    else:
        engine.module.moe[1].register_forward_pre_hook(lambda *_: die())


def in_backward(engine: Any, die: Moment) -> None:
    """Before the first layer's gradients are exchanged, if they are, and before any is reduced."""
    engine.module.last.weight.register_hook(lambda _: die())


def in_step(engine: Any, die: Moment) -> None:
    """Before the gradients, or their norm, are reduced over all ranks."""
    _before(engine, "step", die)


def in_save(engine: Any, die: Moment) -> None:
    """Between the tensors and the checksums of a checkpoint."""
    _before(store, "_own_files", die)


def _before(holder: Any, name: str, die: Moment) -> None:
    ordinary = getattr(holder, name)

    def interposed(*args: Any, **kwargs: Any) -> Any:
        die()
        return ordinary(*args, **kwargs)

    setattr(holder, name, interposed)


def lose_a_rank(
    rank: int, world_size: int, folder: str, ep_size: int, moment: Callable[[Any, Moment], None], number: int
) -> tuple[float, str, str | None]:
    """On the last rank: send itself a signal at a moment of the third step. On the others: when and how they failed."""
    engine = dm.initialize(TinyModel(ep_size), deepspeed_config(1), timeout_s=TIMEOUT_S)
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(folder)

    def die() -> None:
        Path(folder, "moment").write_text(f"{time.monotonic()}")
        os.kill(os.getpid(), number)

    if rank == world_size - 1:
        moment(engine, die)
    try:
        train(engine, range(2, 4), rank, world_size)
        engine.save_checkpoint(folder)
    except Exception as error:
        return time.monotonic(), f"{type(error).__name__}: {error}", describe_lost_rank(error)
    return time.monotonic(), "", None


def survivors(world_size: int, *args: Any, timeout_s: float) -> list[Any]:
    """What all ranks but the last return within `timeout_s`. The last one is killed in the end, stopped or not."""
    port = free_port()
    started = [start_rank(lose_a_rank, rank, world_size, port, *args) for rank in range(world_size)]
    try:
        pipes: list[Connection] = [pipe for pipe, _ in started[:-1]]
        deadline, results = time.monotonic() + timeout_s, []
        while pipes:
            ready = wait(pipes, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"{len(pipes)} of {world_size - 1} ranks have not ended within {timeout_s} s"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                pipes.remove(pipe)
                ok, value = pipe.recv()
                assert ok, value
                results.append(value)
        return results
    finally:
        for _, process in started:
            process.kill()
            process.join()


def lose(folder: Path, world_size: int, ep_size: int, moment: Any, number: int, within_s: float) -> list[str]:
    """The descriptions of the error on the ranks that are left, all of which had one within `within_s`."""
    results = survivors(world_size, f"{folder}", ep_size, moment, number, timeout_s=within_s + 60)
    began = float((folder / "moment").read_text())
    waited = [at - began for at, _, _ in results]
    print(f"{world_size} ranks, EP {ep_size}, {moment.__name__}, {signal.Signals(number).name}: {max(waited):.2f} s")
    for _, error, description in results:
        print("   ", error[:300], "->", description)
    assert max(waited) < within_s
    assert (folder / "latest").read_text() == "step-00000002\n", "half a checkpoint was taken for a whole one"
    assert all(description is not None for _, _, description in results), results
    return [f"{description}" for _, _, description in results]


@pytest.mark.parametrize(
    ("world_size", "ep_size", "moment"),
    [(2, 2, in_forward), (2, 2, in_save), (4, 2, in_backward), (2, 1, in_step)],
)
def test_the_others_of_a_killed_rank_end_at_once(tmp_path: Path, world_size: int, ep_size: int, moment: Any) -> None:
    for described in lose(tmp_path, world_size, ep_size, moment, signal.SIGKILL, MARGIN_S):
        assert "has gone: its connection was closed" in described


@pytest.mark.parametrize(
    ("world_size", "ep_size", "moment", "patience"),
    [(4, 2, in_forward, 1), (2, 2, in_backward, 1), (2, 1, in_step, 1), (2, 1, in_save, SAVE_PATIENCE)],
)
def test_the_others_of_a_rank_that_hangs_end_within_the_configured_time(
    tmp_path: Path, world_size: int, ep_size: int, moment: Any, patience: int
) -> None:
    within_s = TIMEOUT_S * patience + MARGIN_S
    described = lose(tmp_path, world_size, ep_size, moment, signal.SIGSTOP, within_s)
    assert any(f"did not take part within {TIMEOUT_S * patience} s" in text for text in described), described


def timeouts(rank: int, world_size: int, folder: str, stage: int) -> list[tuple[list[int], float]]:
    """Ranks and timeout of every process group of a job that this rank is in."""
    engine = dm.initialize(TinyModel(2), deepspeed_config(stage))
    expert_parallel_group(2)
    train(engine, range(1), rank, world_size)
    engine.save_checkpoint(folder)
    found = []
    for group in distributed_c10d._world.pg_map:
        seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        found.append((sorted(dist.get_process_group_ranks(group)), seconds))
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_every_group_of_a_job_waits_as_long_as_the_default_group(tmp_path: Path, stage: int) -> None:
    """Which `run_ranks` has made with 30 s; torch's default is 1800."""
    for found in run_ranks(timeouts, 4, f"{tmp_path}", stage):
        seconds = [of_group for _, of_group in found]
        assert seconds.count(30.0) >= 5, (
            "the default group, EP and EDP, DeepSpeed's copy of all ranks, and EP without an engine"
        )
        assert seconds.count(30.0 * SAVE_PATIENCE) == 1, "the writer's"
        assert len(seconds) == seconds.count(30.0) + 1, found
