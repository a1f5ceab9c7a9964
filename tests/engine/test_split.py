"""Splits on a running engine: at every ZeRO stage, in both dtypes, and the same on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Plan, Split
from tests.helpers.models import SelectiveModel, TinyModel, batch, deepspeed_config, gathered, shard, train
from tests.helpers.spawn import run_ranks

CASES = [(stage, bf16) for stage in (0, 1, 2, 3) for bf16 in (False, True)]
SPLITS = Plan(items=tuple(Split(layer=f"moe.{i}", parent_id=1, expert_id=4, slot=5) for i in range(2)))


def _split_and_step(rank: int, world_size: int) -> dict[Any, Any]:
    """Split one expert late in training, then step once with lr 0 and once with lr 1e-3."""
    out = {}
    for stage, bf16 in CASES:
        config = deepspeed_config(stage, lr=1e-3, bf16=bf16)
        # With these betas second moments that start from 0 would make the second update sqrt(32 / 2) = 4 times lr.
        config["optimizer"]["params"] |= {"betas": [0.0, 0.999], "weight_decay": 0.0, "eps": 1e-8}
        engine = dm.initialize(TinyModel(2), config, dm.AdaptationConfig(1000, 1, split_reset_share=0.5))
        warmup = 3 if bf16 else 30  # the size of updates is looked at in float32
        train(engine, range(warmup), rank, world_size)
        before = gathered(engine)
        engine.apply_plan(SPLITS)
        after = gathered(engine)
        engine.set_lr(0.0)
        train(engine, range(warmup, warmup + 1), rank, world_size)
        rested = gathered(engine)
        layer = engine.module.moe[0]
        model_rows = layer.router.weight.data[[2, 5]].float().clone() if stage < 3 else None
        engine.set_lr(1e-3)
        train(engine, range(warmup + 1, warmup + 2), rank, world_size)
        out[stage, bf16] = {
            "before": before,
            "split": after,
            "rested": rested,
            "stepped": gathered(engine),
            "model_rows": model_rows,
            "slots": [layer.placement.slot_of(1), layer.placement.slot_of(4)],
        }
    return out


@pytest.fixture(scope="module")
def splits() -> list[dict[Any, Any]]:
    return run_ranks(_split_and_step, 4, timeout_s=240)


@pytest.mark.parametrize(("stage", "bf16"), CASES)
def test_rows_of_both_halves_are_still_there_after_a_step(splits: Any, stage: int, bf16: bool) -> None:
    result = splits[0][stage, bf16]
    old = result["before"]["moe.0.router.weight[1]"]
    parent, child = (result["split"][f"moe.0.router.weight[{i}]"] for i in (1, 4))
    torch.testing.assert_close(torch.stack([parent.norm(), child.norm()]), old.norm().expand(2))
    torch.testing.assert_close((parent + child) / 2**0.5, old, rtol=1e-5, atol=1e-6)
    assert float(torch.cosine_similarity(parent, child, dim=0)) == pytest.approx(0.0, abs=1e-5)
    for name, value in result["split"].items():
        assert torch.equal(result["rested"][name], value), name
    assert result["slots"] == [2, 5]
    if result["model_rows"] is not None:  # what the forward pass uses, in the model's dtype
        rows = torch.stack([parent, child])
        assert torch.equal(result["model_rows"], rows.bfloat16().float() if bf16 else rows)


@pytest.mark.parametrize(("stage", "bf16"), CASES)
def test_the_child_is_a_copy_but_for_its_new_units_and_nobody_else_changes(splits: Any, stage: int, bf16: bool) -> None:
    result = splits[0][stage, bf16]
    for name in ("w1", "w3", "w2"):
        parent, child = (result["split"][f"moe.0.experts.{name}[{i}]"] for i in (1, 4))
        parent, child = (parent.T, child.T) if name == "w2" else (parent, child)
        assert int((parent == child).all(1).sum()) == 12, "half of 24 units are the parent's"
        assert float(child.std() / parent.std()) == pytest.approx(1.0, abs=0.2)
    changed = {name for name, value in result["before"].items() if not torch.equal(result["split"][name], value)}
    assert changed == {f"moe.{i}.router.weight[1]" for i in range(2)}
    assert all(torch.equal(value, rank[stage, bf16]["split"][name])
               for rank in splits for name, value in result["split"].items())  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_updates_after_a_split_are_of_ordinary_size(splits: Any, stage: int) -> None:
    result = splits[0][stage, False]
    for expert_id in (1, 4):
        for name in ("experts.w1", "experts.w2", "router.weight"):
            key = f"moe.0.{name}[{expert_id}]"
            update = float((result["stepped"][key] - result["rested"][key]).square().mean().sqrt())
            assert 1e-4 < update < 2.5e-3, (key, update)


LAYOUTS = {"EP 2, ZeRO-2": (2, 2, 2), "EP 2 x EDP 2, ZeRO-1": (4, 2, 1), "EP 4, ZeRO-3": (4, 4, 3)}


def _train(rank: int, world_size: int, ep_size: int, stage: int) -> dict[str, Any]:
    out = {}
    for rule in ("split_all", "split_strained"):
        adaptation = dm.AdaptationConfig(3, 2, rule=rule, prune_below_share=0.2, last_growth_step=6)
        engine = dm.initialize(TinyModel(ep_size, num_experts=3), deepspeed_config(stage, accumulate=2), adaptation)
        losses = train(engine, range(8), rank, world_size, accumulate=2)
        out[rule] = {
            "losses": losses,
            "weights": gathered(engine),
            "pools": {name: p.expert_ids for name, p in engine.placements().items()},
            "events": [event.to_dict() for event in engine.take_events()],
            "weights of the forward": {
                name: param.detach().clone()
                for name, param in engine.module.named_parameters()
                if ".router." in name and stage < 3
            },
        }
    return out


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    return run_ranks(_train, 1, 1, 2)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_splits_and_trains_like_one_rank(layout: str, one_rank: dict[str, Any]) -> None:
    world_size, ep_size, stage = LAYOUTS[layout]
    ranks = run_ranks(_train, world_size, ep_size, stage, timeout_s=120)
    for rule, expected in one_rank.items():
        actual = ranks[0][rule]
        births = [_births(event) for event in actual["events"]]
        assert births == [_births(event) for event in expected["events"]], rule
        assert actual["losses"] == pytest.approx(expected["losses"], abs=2e-5), rule
        for name, weight in expected["weights"].items():
            error = (actual["weights"][name] - weight).abs().max().item()
            assert error <= 2e-5, (rule, name, error)
        for rank in ranks:
            assert rank[rule]["pools"] == actual["pools"], rule
            for name, weight in actual["weights of the forward"].items():
                assert torch.equal(rank[rule]["weights of the forward"][name], weight), (rule, name)


def _births(event: dict[str, Any]) -> list[Any]:
    return [(name, grown["expert_id"], grown["parent_id"]) for name, change in event["layers"].items()
            for grown in change["grown"]]  # fmt: skip


def test_the_rules_did_what_they_say(one_rank: dict[str, Any]) -> None:
    for rule, result in one_rank.items():
        assert [event["step"] for event in result["events"]] == [3, 6]
        for event in result["events"]:
            assert event["rule"] == rule
            for change in event["layers"].values():
                assert all(grown["seeding"] == "split" for grown in change["grown"])
        first, last = (event["layers"]["moe.0"] for event in result["events"])
        if rule == "split_all":  # 3 experts, then 6, which do not all find a slot in a pool of 8
            assert (first["live_after"], last["live_after"], last["out_of_slots"]) == (6, 8, True)
        else:
            assert [len(change["grown"]) for change in (first, last)] == [1, 1]


def _without_tokens(rank: int, world_size: int) -> dict[str, Any]:
    out = {}
    for rule in ("split_all", "split_strained"):
        model = SelectiveModel(1, num_experts=2)
        model.num_layers = 0 if rank == 1 else 1  # rank 1 sees no layer, and nobody the second
        engine = dm.initialize(model, deepspeed_config(0), dm.AdaptationConfig(1, 1, rule=rule))
        for step in range(2):
            engine.backward(engine(*batch(step, 8)))
            engine.step()
        out[rule] = {
            "births": [_births(event.to_dict()) for event in engine.take_events()],
            "pools": {n: p.expert_ids for n, p in engine.placements().items()},
            "weights": gathered(engine),
        }
    return out


def test_a_rank_without_tokens_takes_part() -> None:
    first, second = run_ranks(_without_tokens, 2)
    for rule, result in first.items():
        assert result["births"] == second[rule]["births"] and result["pools"] == second[rule]["pools"]
        assert result["births"][0] and all(name == "moe.0" for births in result["births"] for name, *_ in births)
        assert all(torch.equal(second[rule]["weights"][name], value) for name, value in result["weights"].items())


def _observed(rank: int, world_size: int) -> list[tuple[bool, bool]]:
    """Per micro step of two windows, the last after growth has ended: is strain noted, are tokens kept?"""
    adaptation = dm.AdaptationConfig(3, 2, rule="split_strained", last_growth_step=3)
    engine = dm.initialize(TinyModel(1, num_experts=2), deepspeed_config(1, accumulate=2), adaptation)
    found = []
    for micro in range(12):
        engine.backward(engine(*shard(batch(micro, 16), rank, world_size)))
        record = engine.records.of_step["moe.0"]
        kept = engine.adaptation.sampler._kept
        found.append((bool(record.statistics.get("strain", torch.zeros(1)).any()), bool(kept)))
        engine.step()
    return found


def test_strain_and_tokens_are_only_kept_where_a_split_will_ask_for_them() -> None:
    # Steps 2 and 3 are in the window, and the tokens are those of the step before the adaptation.
    expected = [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)] * 2 + [(False, False)] * 6
    assert run_ranks(_observed, 1)[0] == expected
