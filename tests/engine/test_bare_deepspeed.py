"""What `deepspeed.initialize` does with a model that `dynmoe_ds.initialize` was meant for."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import nn

from dynmoe_ds.engine import seam
from dynmoe_ds.errors import ConfigError
from tests.helpers.models import HIDDEN, TinyModel, batch, deepspeed_config, shard
from tests.helpers.spawn import run_ranks

LR = 0.1
STAGES = (0, 1, 2, 3)


def stock(model: nn.Module, stage: int) -> Any:
    """DeepSpeed's own engine, with plain SGD."""
    config = deepspeed_config(stage)
    del config["optimizer"]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]


def _share_experts(rank: int, world_size: int) -> list[tuple[str, bool]]:
    seam.init_distributed(30.0)
    told = []
    for stage in STAGES:
        model = TinyModel(2)
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(ConfigError) as caught:
            stock(model, stage)
        told.append((f"{caught.value}", all(map(torch.equal, before, model.parameters()))))
    return told


def test_layers_that_share_experts_are_refused_before_one_is_overwritten() -> None:
    message = (
        "A MoELayer with ep_size 2 was given to deepspeed.initialize, which would overwrite the experts of every rank "
        "by those of rank 0 and average gradients of different experts. Use dynmoe_ds.initialize."
    )
    assert run_ranks(_share_experts, 2, timeout_s=60) == [[(message, True)] * len(STAGES)] * 2


def _replicate_experts(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    seam.init_distributed(30.0)
    trained = []
    for stage in STAGES:
        engine = stock(TinyModel(1), stage)
        engine.backward(engine(*shard(batch(0, 32), rank, world_size)))
        engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
            trained.append({name: param.detach().clone() for name, param in engine.module.named_parameters()})
    return trained


def test_layers_with_all_experts_on_each_rank_train_as_any_module_does() -> None:
    model = TinyModel(1)
    model(*batch(0, 32)).backward()
    for of_rank in run_ranks(_replicate_experts, 2, timeout_s=60):
        for stage, trained in zip(STAGES, of_rank, strict=True):
            for name, param in model.named_parameters():
                step = torch.zeros_like(param) if param.grad is None else param.grad
                expected = (param - LR * step).detach()
                assert torch.allclose(trained[name], expected, rtol=1e-5, atol=1e-7), (stage, name)


class OfDeepSpeed(nn.Module):
    """A model with DeepSpeed's own experts."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(HIDDEN, nn.Linear(HIDDEN, HIDDEN), num_experts=4, ep_size=2)


def _own_experts_of_deepspeed(rank: int, world_size: int) -> list[str]:
    seam.init_distributed(30.0)
    told = []
    for stage in (1, 2):
        with pytest.raises(AssertionError) as caught:
            stock(OfDeepSpeed(), stage)
        told.append(f"{caught.value}")
    return told


def test_what_deepspeed_says_of_its_own_experts_without_groups_of_their_own() -> None:
    """The words in docs/troubleshooting.md."""
    for told in run_ranks(_own_experts_of_deepspeed, 2, timeout_s=60):
        assert all("None of the param groups are marked as MoE" in message for message in told)
