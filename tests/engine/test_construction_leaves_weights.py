"""`initialize` changes no weight and leaves the optimiser without state, at every ZeRO stage and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, deepspeed_config, gathered, train
from tests.helpers.spawn import run_ranks

CASES = [(stage, bf16) for stage in (0, 1, 2, 3) for bf16 in (False, True)]


def _start(rank: int, world_size: int) -> dict[Any, Any]:
    initial = {name: value.detach().clone() for name, value in TinyModel(1).named_parameters()}
    out = {}
    for stage, bf16 in CASES:
        config = deepspeed_config(stage, bf16=bf16)
        config["optimizer"]["params"]["weight_decay"] = 1.0  # shows a step that was not asked for
        engine = dm.initialize(TinyModel(1), config)
        before = gathered(engine)
        losses = train(engine, range(4), rank, world_size)
        out[stage, bf16] = {"before": before, "losses": losses}
    return {"initial": initial, **out}


@pytest.fixture(scope="module")
def runs() -> dict[Any, Any]:
    return run_ranks(_start, 1)[0]


@pytest.mark.parametrize(("stage", "bf16"), CASES)
def test_construction_takes_no_step(runs: dict[Any, Any], stage: int, bf16: bool) -> None:
    for name, value in runs[stage, bf16]["before"].items():
        whole, _, expert_id = name.partition("[")
        expected = runs["initial"][whole]
        if expert_id:
            expected = expected[2 * int(expert_id.rstrip("]"))]  # four experts in every other one of eight slots
        assert torch.equal(value, expected.bfloat16().float() if bf16 else expected), name


@pytest.mark.parametrize("bf16", [False, True])
def test_all_stages_train_alike_on_one_rank(runs: dict[Any, Any], bf16: bool) -> None:
    for stage in (1, 2, 3):
        assert runs[stage, bf16]["losses"] == pytest.approx(runs[0, bf16]["losses"], abs=1e-3 if bf16 else 5e-6), stage
