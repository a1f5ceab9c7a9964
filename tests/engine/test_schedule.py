"""What counts for the schedule and the records, and what does not."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.engine.activation_checkpointing import non_reentrant_checkpoint
from tests.helpers.models import HIDDEN, TinyModel, batch, deepspeed_config, gathered, shard, train
from tests.helpers.spawn import run_ranks

CHECKPOINTS: dict[str, Any] = {
    "none": None,
    "torch": partial(checkpoint, use_reentrant=False),
    "deepspeed": non_reentrant_checkpoint,
}


def _run(rank: int, world_size: int) -> dict[Any, Any]:
    out = {}
    for stage, (name, function) in product((2, 3), CHECKPOINTS.items()):
        model = TinyModel(2, num_experts=3, checkpoint=function)
        config = deepspeed_config(stage, accumulate=2)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # recomputation must gather parameters
        engine = dm.initialize(model, config, dm.AdaptationConfig(every_steps=3, window_steps=2))
        steps_of_events, recorded = [], []
        for step in range(7):
            for micro in range(2):
                x, y = shard(batch(2 * step + micro, 32), rank, world_size)
                engine.backward(engine(x, y))
                engine.step()
            engine.eval()
            with torch.no_grad():
                for _ in range(3):
                    engine(x, y)
            engine.train()
            events = [event.to_dict() for event in engine.take_events()]
            steps_of_events += [(step + 1, e["step"], e["layers"]["moe.0"]["num_tokens"]) for e in events]
            recorded.append(int(engine.take_records()["moe.0"].num_tokens))
        out[stage, name] = {"events": steps_of_events, "recorded": recorded, "weights": gathered(engine)}
    return out


@pytest.fixture(scope="module")
def runs() -> dict[Any, Any]:
    return run_ranks(_run, 2, timeout_s=120)[0]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_adaptations_follow_optimiser_steps_and_their_window(runs: dict[Any, Any], stage: int, name: str) -> None:
    # After steps 3 and 6, finished when step() returns, on 2 steps x 2 micro steps x 32 tokens. Micro steps,
    # recomputation and evaluation neither move the schedule nor add to the records.
    assert runs[stage, name]["events"] == [(3, 3, 128), (6, 6, 128)]
    assert runs[stage, name]["recorded"] == [64] * 7


@pytest.mark.parametrize("name", ["torch", "deepspeed"])
@pytest.mark.parametrize("stage", [2, 3])
def test_activation_checkpointing_changes_nothing(runs: dict[Any, Any], stage: int, name: str) -> None:
    expected, actual = runs[stage, "none"]["weights"], runs[stage, name]["weights"]
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def _padded(rank: int, world_size: int) -> dict[str, Any]:
    """A batch [2, L, D] whose last tokens are padding, with other rubbish in the padding on each run."""
    out = {}
    for name, function in CHECKPOINTS.items():
        for rubbish in (1.0, 50.0):
            engine = dm.initialize(TinyModel(2, checkpoint=function), deepspeed_config(2), dm.AdaptationConfig(1, 1))
            x, y = (t.view(2, 8, HIDDEN).clone() for t in shard(batch(0, 32), rank, world_size))
            mask = torch.ones(2, 8, dtype=torch.int64)
            mask[:, 5:] = 0
            x[:, 5:] = rubbish
            engine.backward(engine(x, y, attention_mask=mask))
            engine.step()
            records = engine.take_records()["moe.1"]
            out[name, rubbish] = {
                "num_tokens": int(records.num_tokens),
                "records": records.tokens_per_slot,
                "unrouted_sum": records.unrouted_sum,
                "weights": gathered(engine),
            }
    return out


def test_padding_is_neither_routed_nor_counted_nor_trained_on() -> None:
    results = run_ranks(_padded, 2)[0]
    first = results["none", 1.0]
    for key, result in results.items():
        assert result["num_tokens"] == 2 * 2 * 5, key
        assert torch.equal(result["records"], first["records"]), key
        assert torch.equal(result["unrouted_sum"], first["unrouted_sum"]), key
        assert all(torch.equal(result["weights"][n], w) for n, w in first["weights"].items()), key


def _uneven(rank: int, world_size: int) -> list[float]:
    """Ranks with zero tokens, and evaluations of other lengths on each expert-parallel group."""
    losses = []
    for stage in (0, 1, 2, 3):
        engine = dm.initialize(TinyModel(2), deepspeed_config(stage), dm.AdaptationConfig(1, 1))
        for step in range(3):
            x, y = batch(step, 12)
            mine = slice(0, 0) if rank == step else slice(0, 3 * rank + 1)
            h = engine(x[mine], y[mine])
            engine.backward(torch.nan_to_num(h) if rank == step else h)
            engine.step()
        engine.eval()
        with torch.no_grad():
            # Replicas (expert-parallel groups) may evaluate for different times; the ranks of one group may not. At
            # ZeRO-3 every forward gathers parameters over all replicas, so there all ranks must run alike.
            for _ in range(1 if stage == 3 else 1 + 2 * (rank // 2)):
                losses.append(float(engine(*batch(9, 4))))
        engine.train()
        losses += train(engine, range(1), rank, world_size)
    return losses


def test_empty_ranks_and_uneven_evaluations_do_not_hang() -> None:
    results = run_ranks(_uneven, 4, timeout_s=60)
    assert [len(losses) for losses in results] == [8, 8, 14, 14]
    assert all(loss == loss for losses in results for loss in losses), "NaN"


def _evaluate(rank: int, world_size: int) -> Any:
    engine = dm.initialize(TinyModel(1), deepspeed_config(0))
    with torch.no_grad():
        for layer in engine.module.moe:
            layer.router.threshold.fill_(2.0)  # nobody is routed
    x, _ = batch(0, 8)
    train(engine, range(1), rank, world_size)
    trained = engine.take_records()["moe.0"]
    engine.eval()
    layer = engine.module.moe[0]
    return float(layer(x).detach().abs().sum()), float(engine.train().module.moe[0](x).detach().abs().sum()), trained


def test_evaluation_gives_every_token_an_expert() -> None:
    evaluated, trained, records = run_ranks(_evaluate, 1)[0]
    assert evaluated > 0 and trained == 0
    assert int(records.num_unrouted) == int(records.num_tokens) == 32
