"""Replicas draw the same noise for a new expert, also when the layers of each rank were built from another seed."""

from __future__ import annotations

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Grow, Plan
from tests.helpers.models import HIDDEN, TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks


def _grown_by_seed(rank: int, world_size: int, seeding: str) -> dict[str, torch.Tensor]:
    """The weights that each rank's forward uses, not the masters: reading those at ZeRO-1 sums the replicas' parts."""
    model = TinyModel(1)
    for layer in model.moe:
        layer.seed += 1000 * rank  # as from a script that seeds torch with its rank
    engine = dm.initialize(model, deepspeed_config(0), dm.AdaptationConfig(1000, 1, seeding=seeding, noise=0.5))
    train(engine, range(1), rank, world_size)
    row = torch.ones(HIDDEN, dtype=torch.float64) / HIDDEN**0.5
    grow = Grow(layer="moe.0", expert_id=4, slot=5, gate_row=row, seeding=seeding, parent_id=None)
    engine.apply_plan(Plan(items=(grow,)))
    return {name: param.detach()[5].clone() for name, param in engine.module.moe[0].experts.named_parameters()}


@pytest.mark.parametrize("seeding", ["copy_nearest", "fresh"])
def test_a_new_expert_is_the_same_on_all_replicas(seeding: str) -> None:
    first, second = run_ranks(_grown_by_seed, 2, seeding)
    for name, value in first.items():
        assert value.any() and torch.equal(value, second[name]), name
