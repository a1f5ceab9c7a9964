"""Which of DeepSpeed's collectives a `StallClock` sees, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import dynmoe_ds as dm
from dynmoe_ds.distributed import StallClock
from dynmoe_ds.engine.timed_collectives import COLLECTIVES
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks


def _counts(rank: int, world_size: int) -> dict[str, Any]:
    clock = StallClock(torch.device("cpu"))
    found: dict[str, Any] = {}
    for stage, ep_size in ((0, 1), (1, 1), (2, 2), (3, 2)):
        engine = dm.initialize(TinyModel(ep_size), deepspeed_config(stage))
        train(engine, range(1), rank, world_size)
        before = clock.take()["communication"]
        clock.start()
        train(engine, range(1, 3), rank, world_size)
        clock.stop()
        seconds = clock.take()["communication"]
        found[f"{stage} {ep_size}"] = len(before), len(seconds), sum(seconds)
    backend = deepspeed.comm.comm.cdb
    dm.initialize(TinyModel(1), deepspeed_config(0))
    again = getattr(backend, COLLECTIVES[0])
    found["once"] = not isinstance(again._collective, type(again))
    handle = deepspeed.comm.all_reduce(torch.ones(1), async_op=True)
    found["handle"] = handle.wait(), handle.is_completed(), isinstance(handle, dist.Work)
    return found


def test_gradients_and_parameters_on_their_way_are_seen_on_both_ranks_alike():
    first, second = run_ranks(_counts, 2)
    for found, other in ((first, second), (second, first)):
        for name in ("0 1", "1 1", "2 2", "3 2"):
            before, count, seconds = found[name]
            assert before == 0, "the clock was not running"
            assert count == other[name][1] and seconds > 0
        # Nothing of ours between ranks but two steps' check for NaN: the rest is DeepSpeed's.
        assert found["1 1"][1] > 2
        assert found["3 2"][1] > found["2 2"][1], "ZeRO-3 gathers its parameters"
        assert found["once"]
        assert found["handle"][1]
