"""Every micro step may have its own padding, also where activation checkpointing recomputes."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from tests.helpers.models import HIDDEN, TinyModel, batch, deepspeed_config
from tests.helpers.spawn import run_ranks


def _steps(rank: int, world_size: int) -> list[int]:
    model = TinyModel(1, checkpoint=partial(checkpoint, use_reentrant=False))
    engine = dm.initialize(model, deepspeed_config(1, accumulate=2))
    x, y = (t.view(2, 8, HIDDEN) for t in batch(0, 16))
    counted = []
    for length in (5, 8, 3, 6):
        mask = (torch.arange(8) < length).long().expand(2, 8).contiguous()
        engine.backward(engine(x, y, attention_mask=mask))
        engine.step()
        counted.append(int(engine.take_records()["moe.1"].num_tokens))
    return counted


def test_each_micro_step_has_its_own_padding() -> None:
    assert run_ranks(_steps, 1) == [[0, 2 * (5 + 8), 0, 2 * (3 + 6)]]
