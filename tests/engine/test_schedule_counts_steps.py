"""The schedule counts optimiser steps. No other count here (2, 4 or 5 per step) gives the same steps, as 3 would."""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, batch, deepspeed_config
from tests.helpers.spawn import run_ranks


def _run(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    model = TinyModel(1, num_experts=3, checkpoint=partial(checkpoint, use_reentrant=False))
    engine = dm.initialize(model, deepspeed_config(2, accumulate=2), dm.AdaptationConfig(4, 2))
    seen = []
    for step in range(9):
        for micro in range(2):
            engine.backward(engine(*batch(2 * step + micro, 16)))
            engine.step()
        with torch.no_grad():
            engine(*batch(0, 16))  # in training mode: not recorded either
            engine.eval()
            for _ in range(3):
                engine(*batch(0, 16))
        engine.train()
        seen += [(step + 1, event.step, event.layers["moe.0"]["num_tokens"]) for event in engine.take_events()]
    return seen


def test_adaptations_come_after_every_fourth_optimiser_step() -> None:
    assert run_ranks(_run, 1) == [[(4, 4, 64), (8, 8, 64)]]
