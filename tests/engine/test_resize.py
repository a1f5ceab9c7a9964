"""A pool of another size in a running job: training goes on as if it had always been of that size."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dynmoe_ds as dm
from dynmoe_ds.engine import snapshot
from dynmoe_ds.errors import CheckpointError, DivergenceError, NonFiniteError, PlacementError, SurgeryError
from tests.helpers.models import TinyModel, batch, deepspeed_config, gathered, shard, train
from tests.helpers.spawn import run_ranks

STAGES = (0, 1, 2, 3)
ADAPTATION = dm.AdaptationConfig(4, 3)  # windows are steps 2 to 4 and 6 to 8
# Before the first step, in the middle of a window, right after an adaptation, in the middle of the next window.
SIZES = {0: 6, 3: 12, 4: 16, 7: 6}
END = 10
FLOAT32 = 5e-6
BF16 = 2e-3  # losses near 1, of weights that are rounded in another order


def moments(engine: Any) -> dict[str, torch.Tensor]:
    """First and second moments of this rank's experts by id."""
    found = {}
    for name, layer in engine.layers.items():
        for key, param in layer.experts.named_parameters():
            state = engine.masters.read(param, 0, len(layer.local_slots))
            for expert_id, slot in layer.placement.slots_by_id.items():
                if slot in layer.local_slots:
                    for kind in ("exp_avg", "exp_avg_sq"):
                        found[f"{name}.{key}[{expert_id}]/{kind}"] = state[kind][slot - layer.local_slots.start]
    return found


def outcome(engine: Any, rank: int, world_size: int, sizes: dict[int, int], accumulate: int = 1) -> dict[str, Any]:
    losses = []
    for step in range(END):
        if step in sizes:
            engine.resize_slots(sizes[step])
            assert {layer.num_slots for layer in engine.layers.values()} == {sizes[step]}
        losses += train(engine, range(step, step + 1), rank, world_size, accumulate=accumulate)
    return {
        "losses": losses,
        "weights": gathered(engine),
        "moments": moments(engine),
        "live": {name: placement.live_ids for name, placement in engine.placements().items()},
        "events": [
            {name: {key: layer[key] for key in ("pruned", "tokens_per_expert", "num_tokens", "num_unrouted", "mean_k")}}
            for event in engine.take_events()
            for name, layer in event.to_dict()["layers"].items()
        ],
        "steps": engine.global_steps,
        "norm": engine.gradient_norm(),
    }


def resized_and_not(
    rank: int, world_size: int, ep_size: int, stages: tuple[int, ...], options: dict[str, Any]
) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for stage in stages:
        found[stage] = []
        for sizes in ({step: -(-size // ep_size) * ep_size for step, size in SIZES.items()}, {}):
            model = TinyModel(ep_size, num_experts=3, num_slots=8)
            engine = dm.initialize(model, deepspeed_config(stage, **options), ADAPTATION)
            found[stage].append(outcome(engine, rank, world_size, sizes, options.get("accumulate", 1)))
    return found


def carried(rank: int, world_size: int, ep_size: int, options: dict[str, Any]) -> dict[int, Any]:
    """State before and after resizes, and losses after a resize there and back, beside those of an undisturbed run.

    Four experts, which come back to the very slots they started in: columns of a product are rounded by their place.
    """
    found: dict[int, Any] = {}
    for stage in STAGES:
        states, losses = [], []
        for resizes in (True, False):
            model = TinyModel(ep_size, num_experts=4, num_slots=8)
            engine = dm.initialize(model, deepspeed_config(stage, clip=0.05, **options), ADAPTATION)
            of_run = train(engine, range(3), rank, world_size)  # the window is open
            for size in (12, 4, 8) if resizes else ():
                states.append((gathered(engine), moments(engine) if ep_size == 1 else {}))
                engine.resize_slots(size)
            states.append((gathered(engine), moments(engine) if ep_size == 1 else {}))
            losses.append(of_run + train(engine, range(3, END), rank, world_size))
            losses[-1].append(engine.gradient_norm())
            losses[-1] += gathered(engine).values()
        found[stage] = states, losses
    return found


@pytest.mark.parametrize(
    ("world_size", "ep_size", "bf16"),
    [(1, 1, False), (2, 1, True), (2, 2, False), (2, 2, True)],
    ids=["1 rank", "EDP 2, bf16", "EP 2", "EP 2, bf16"],
)
def test_everything_is_carried_bit_for_bit(world_size: int, ep_size: int, bf16: bool) -> None:
    for of_rank in run_ranks(carried, world_size, ep_size, {"bf16": bf16}, timeout_s=120):
        for stage, (states, losses) in of_rank.items():
            first = states[0]
            for state in states[1:]:
                for got, want in zip(state, first, strict=True):
                    assert got.keys() == want.keys()
                    assert all(torch.equal(got[name], value) for name, value in want.items()), stage
            resized, undisturbed = losses
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*losses, strict=True)), stage
            assert len(resized) == len(undisturbed) > END


# With another number of columns, products of matrices are rounded in another order.
@pytest.mark.parametrize(
    ("world_size", "ep_size", "stages", "options"),
    [
        (1, 1, STAGES, {}),
        (2, 1, STAGES, {}),
        (2, 2, STAGES, {}),
        (2, 2, STAGES, {"bf16": True}),
        (2, 2, (0, 2), {"clip": 0.05, "accumulate": 2}),
        (4, 2, (1, 3), {}),
        (4, 4, (1,), {"bf16": True}),
    ],
    ids=["1 rank", "EDP 2", "EP 2", "EP 2, bf16", "EP 2, clipped and accumulated", "EP 2 x EDP 2", "EP 4, bf16"],
)
@pytest.mark.timeout(400)
def test_training_goes_on_as_in_an_undisturbed_run(
    world_size: int, ep_size: int, stages: tuple[int, ...], options: dict[str, Any]
) -> None:
    bf16 = "bf16" in options
    found = run_ranks(resized_and_not, world_size, ep_size, stages, options, timeout_s=200)
    for of_rank in found:
        for stage in stages:
            got, want = of_rank[stage]
            assert got["losses"] == pytest.approx(want["losses"], abs=BF16 if bf16 else FLOAT32)
            assert got["live"] == want["live"] and got["steps"] == want["steps"]
            assert got["events"] == want["events"] and len(got["events"]) == 4
            assert len(want["live"]["moe.0"]) > 3, "nothing grew"
            assert got["norm"] == pytest.approx(want["norm"], rel=0.05 if bf16 else 1e-4)
            for name, weight in want["weights"].items():
                error = (got["weights"][name] - weight).abs().max().item()
                assert error <= (2e-2 if bf16 else 5e-6), (name, error)


def wide(num_slots: int) -> nn.Module:
    layer = {"hidden_size": 16, "ffn_hidden_size": 512, "num_experts": 4, "num_slots": num_slots, "ep_size": 2}
    model = TinyModel(2)
    model.moe = nn.ModuleList(dm.MoELayer(**layer, seed=i) for i in range(2))
    return model


def tensor_bytes() -> int:
    """Bytes of all tensors that this process holds, storages counted once."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def memory(rank: int, world_size: int, stage: int, bf16: bool) -> dict[str, Any]:
    engine = dm.initialize(wide(16), deepspeed_config(stage, bf16=bf16))
    dtype = next(engine.module.parameters()).dtype

    def measure(step: int) -> tuple[dict[str, int], int]:
        """Experts between backward and step, where there are gradients; and all tensors between two steps."""
        train(engine, range(step, step + 1), rank, world_size)
        engine.backward(engine(*shard(batch(step + 1, 32, dtype), rank, world_size)))
        experts = engine.expert_memory()
        engine.step()
        return experts, tensor_bytes()

    ordinary = engine._construction.build

    def build() -> Any:
        assert old() is None, "the old optimiser is still there when the next one needs memory"
        return ordinary()

    engine._construction.build = build
    found: dict[str, Any] = {"16": measure(0)}
    for cycle in range(2):
        for size in (4, 16):
            old = weakref.ref(engine.optimizer)
            engine.resize_slots(size)
            found[f"{size}, cycle {cycle}"] = measure(4 * cycle + 2)
    return found


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (0, True), (1, True), (2, False), (3, False), (3, True)])
def test_memory_follows_the_pool(stage: int, bf16: bool) -> None:
    for found in run_ranks(memory, 2, stage, bf16, timeout_s=120):
        whole, total = found["16"]
        # Weights, and float32 masters where those are not the weights; at ZeRO 2 and 3 on one of one replicas.
        num_elements = 2 * 8 * 3 * 512 * 16
        assert whole["weights"] == num_elements * (2 if bf16 else 4)
        assert whole["masters"] == (0 if stage == 0 and not bf16 else 4 * num_elements)
        assert whole["moments"] == 8 * num_elements
        assert num_elements * (2 if bf16 else 4) <= whole["gradients"] <= 2 * 4 * num_elements
        for cycle in (0, 1):
            small, small_total = found[f"4, cycle {cycle}"]
            for kind, size in small.items():
                assert size == pytest.approx(whole[kind] / 4, rel=0.02), (kind, cycle)
            # All of it is free: what the process holds falls by three quarters of the experts.
            experts = sum(whole[kind] for kind in ("weights", "masters", "moments"))
            assert total - small_total >= experts * 3 / 4 * 0.98, cycle
            assert found[f"16, cycle {cycle}"][0] == whole
            assert found[f"16, cycle {cycle}"][1] == pytest.approx(total, rel=0.01), cycle


class Tied(TinyModel):
    """The last layer's weight is the first's, its bias is frozen."""

    def __init__(self) -> None:
        super().__init__(1, num_experts=3)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)
        self.first.weight.marked = "by the user"  # type: ignore[attr-defined]


def ties_and_marks(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in STAGES:
        losses = []
        for sizes in ({}, {2: 12}):
            model = Tied()
            params = deepspeed_config(stage)["optimizer"]["params"]
            config = deepspeed_config(stage)
            del config["optimizer"]
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **params)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            engine = dm.initialize(model, config, optimizer=optimizer, lr_scheduler=scheduler)
            calls: list[int] = []
            model.moe[0].router.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            for step in range(4):
                if step in sizes:
                    engine.eval()
                    engine.resize_slots(sizes[step])
                    assert not any(module.training for module in engine.module.modules())
                    engine.train()
                losses += train(engine, range(step, step + 1), rank, world_size)
            assert len(calls) == 4
            assert model.last.weight is model.first.weight
            assert model.first.weight.marked == "by the user"
            assert not model.last.bias.requires_grad
            assert engine.get_lr()[0] == pytest.approx(1e-2 / 2**4)
        found[f"{stage}"] = losses
    return found


def test_ties_frozen_weights_marks_hooks_and_an_own_optimiser_stay() -> None:
    for losses in run_ranks(ties_and_marks, 2, timeout_s=120)[0].values():
        assert losses[:4] == losses[4:]


def records_across(rank: int, world_size: int) -> dict[str, Any]:
    engine = dm.initialize(TinyModel(2, num_experts=3, num_slots=4), deepspeed_config(1))
    train(engine, range(1), rank, world_size)
    first = dict.fromkeys((0, 1, 2), 0)
    record = engine.take_records()["moe.0"]
    for id_, slot in engine.placements()["moe.0"].slots_by_id.items():
        first[id_] = int(record.tokens_per_slot[slot])
    # The same step's tokens again, in two pools, one of which is gone when they are asked for.
    engine.set_lr(0.0)
    train(engine, range(1), rank, world_size)
    engine.resize_slots({"moe.0": 8})
    train(engine, range(1), rank, world_size)
    loads = engine.last_loads()["moe.0"]
    by_placement = engine.take_records_by_placement()
    train(engine, range(1), rank, world_size)
    engine.resize_slots({"moe.0": 6})
    untaken = engine.records.untaken()
    summed = engine.take_records()["moe.0"]
    again = engine.take_records()["moe.0"]
    return {
        "first": first,
        "loads": loads,
        "sizes": [(p["moe.0"].num_slots, p["moe.1"].num_slots) for p, _ in by_placement],
        "by placement": [
            {id_: int(r["moe.0"].tokens_per_slot[slot]) for id_, slot in p["moe.0"].slots_by_id.items()}
            for p, r in by_placement
        ],
        "summed": {
            id_: int(summed.tokens_per_slot[slot]) for id_, slot in engine.placements()["moe.0"].slots_by_id.items()
        },
        "untaken": int(untaken["moe.0"].num_tokens) if untaken else 0,
        "again": int(again.num_tokens),
    }


def test_records_follow_their_experts() -> None:
    found = run_ranks(records_across, 2)
    for of_rank in found:
        assert sum(of_rank["first"].values()) > 0
        assert of_rank["sizes"] == [(4, 4), (8, 4)]
        # The first step has changed the weights; from then on they stay.
        assert of_rank["by placement"][0] == of_rank["by placement"][1] == of_rank["summed"] == of_rank["loads"]
        assert of_rank["again"] == 0
    assert [of_rank["untaken"] for of_rank in found] == [32, 0], "the sum over ranks is the first rank's"


def counts_across_plans(rank: int, world_size: int) -> dict[str, Any]:
    """Tokens by expert while an expert is moved by a plan of one's own, and moved back by an adaptation."""
    engine = dm.initialize(TinyModel(2, num_experts=3, num_slots=4), deepspeed_config(1), dm.AdaptationConfig(2, 2))

    def counts(records: dict[str, Any]) -> dict[int, int]:
        slots = engine.placements()["moe.0"].slots_by_id
        return {expert_id: int(records["moe.0"].tokens_per_slot[slot]) for expert_id, slot in slots.items()}

    def move() -> dm.adaptation.Plan:
        free = engine.placements()["moe.0"].free_slots[0]
        return dm.adaptation.Plan(items=(dm.adaptation.Move(layer="moe.0", expert_id=0, to_slot=free),))

    engine.adaptation.controller.decide = lambda *args, **kwargs: (move(), frozenset())
    first_slot = engine.placements()["moe.0"].slot_of(0)
    train(engine, range(1), rank, world_size)
    loads = [engine.last_loads()["moe.0"]]
    windows = [counts(engine.sum_over_ranks(engine.records.window.records()))]
    engine.apply_plan(move())
    windows.append(counts(engine.sum_over_ranks(engine.records.window.records())))
    train(engine, range(1, 2), rank, world_size)
    loads.append(engine.last_loads()["moe.0"])
    assert engine.placements()["moe.0"].slot_of(0) == first_slot and len(engine.take_events()) == 1
    untaken = counts(engine.take_records())
    engine.apply_plan(dm.adaptation.Plan(items=(dm.adaptation.Prune(layer="moe.0", expert_id=1),)))
    return {"windows": windows, "loads": loads, "untaken": untaken, "lives": engine.adaptation.lives.of("moe.0")}


def test_counts_follow_experts_that_plans_move() -> None:
    found = run_ranks(counts_across_plans, 2)[0]
    before, after = found["windows"]
    assert before == after and len(set(before.values())) > 1
    first, second = found["loads"]
    assert found["untaken"] == {expert_id: first[expert_id] + second[expert_id] for expert_id in (0, 1, 2)}
    assert [found["lives"][expert_id]["died"] for expert_id in (0, 1, 2)] == [None, 2, None]


def spoil_gradient(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
    output.register_hook(lambda grad: torch.full_like(grad, float("inf")))


def across_changes(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """What was noted across several changes of the pools, what a load leaves of it, and what is watched afterwards."""
    snapshot._BYTES_AT_ONCE = 1  # one entry after another, as with large pools
    engine = dm.initialize(TinyModel(2, num_experts=3, num_slots=8), deepspeed_config(1), ADAPTATION)
    train(engine, range(1), rank, world_size)
    engine.save_checkpoint(folder)
    train(engine, range(1, 4), rank, world_size)  # experts are born after step 4
    found: dict[str, Any] = {"loads": [engine.last_loads()]}
    engine.resize_slots({"moe.0": 8, "moe.1": 12})
    found["loads"].append(engine.last_loads())
    found["sizes"] = [layer.num_slots for layer in engine.layers.values()]
    found["live"] = {name: placement.live_ids for name, placement in engine.placements().items()}
    train(engine, range(4, 5), rank, world_size)
    engine.resize_slots(10)
    found["untaken"] = int(engine.take_records()["moe.0"].num_tokens)
    train(engine, range(5, 6), rank, world_size)
    engine.apply_plan(dm.adaptation.Plan(items=()))
    engine.load_checkpoint(folder)
    found["loaded"] = int(engine.take_records()["moe.0"].num_tokens)
    if rank == 1:
        engine.layers["moe.0"].register_forward_hook(spoil_gradient)
    try:
        train(engine, range(1, 2), rank, world_size)
    except NonFiniteError as error:
        found["error"] = f"{error}"
    return found


def test_what_was_noted_outlives_several_changes_of_the_pools(tmp_path: Path) -> None:
    for found in run_ranks(across_changes, 2, f"{tmp_path}"):
        assert found["sizes"] == [8, 12]
        before, after = found["loads"]
        assert before == after
        assert all(set(loads) == {0, 1, 2} < set(found["live"][name]) for name, loads in before.items()), "no newborn"
        assert found["untaken"] == 5 * 32, "of five steps, in three pools"
        assert found["loaded"] == 32, "of the checkpoint's step"
        assert "the gradient of moe.0." in found["error"], "the new parameters are watched"


def load_into_other_pools(rank: int, world_size: int, folder: str) -> tuple[list[int], list[Any], int]:
    adaptation = dm.AdaptationConfig(99, 2, pool="elastic")
    engine = dm.initialize(TinyModel(1, num_experts=3, num_slots=8), deepspeed_config(1), adaptation)
    train(engine, range(1), rank, world_size)
    loads = [engine.last_loads()]
    engine.save_checkpoint(folder)
    engine.resize_slots(12)
    train(engine, range(1, 2), rank, world_size)
    loads.append(engine.last_loads())
    engine.load_checkpoint(folder)
    loads.append(engine.last_loads())
    engine.save_checkpoint(folder)
    return [layer.num_slots for layer in engine.layers.values()], loads, engine.global_steps


def test_loads_of_another_training_and_pool_are_forgotten_by_a_load(tmp_path: Path) -> None:
    ((sizes, (saved, forgotten, loaded), step),) = run_ranks(load_into_other_pools, 1, f"{tmp_path}")
    assert (sizes, step) == ([8, 8], 1)
    assert saved == loaded != forgotten


# Errors


def errors(rank: int, world_size: int) -> dict[str, str]:
    engine = dm.initialize(TinyModel(2, num_experts=3, num_slots=8), deepspeed_config(2))
    train(engine, range(2), rank, world_size)

    def error_of(action: Callable[[], object]) -> str:
        try:
            action()
        except (CheckpointError, DivergenceError, PlacementError, SurgeryError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    found = {
        "small": error_of(lambda: engine.resize_slots(2)),
        "odd": error_of(lambda: engine.resize_slots({"moe.1": 5})),
        "unknown": error_of(lambda: engine.resize_slots({"moe.7": 8})),
        "differing": error_of(lambda: engine.resize_slots(8 + 2 * rank)),
    }
    loss = engine(*shard(batch(5, 32), rank, world_size))
    found["middle"] = error_of(lambda: engine.resize_slots(12))
    engine.backward(loss)
    engine.step()
    found["losses"] = f"{train(engine, range(3, 5), rank, world_size)}"

    model = TinyModel(2, num_experts=3, num_slots=8)
    stray = nn.Parameter(torch.ones(2))
    engine = dm.initialize(model, deepspeed_config(0), model_parameters=[*model.parameters(), stray])
    found["stray"] = error_of(lambda: engine.resize_slots(12))
    return found


def test_what_cannot_be_done_is_an_error_on_every_rank_and_changes_nothing() -> None:
    for found in run_ranks(errors, 2):
        assert found["small"] == "PlacementError: moe.0: A pool of 2 slots cannot hold the 3 live experts."
        assert found["odd"] == "PlacementError: moe.1: A pool of 5 slots cannot be shared evenly by 2 ranks."
        assert found["unknown"] == "PlacementError: There is no layer called 'moe.7'. Layers: moe.0, moe.1."
        assert found["differing"].startswith("DivergenceError: The ranks disagree on the sizes of the pools.")
        assert found["middle"].startswith("CheckpointError: The pools were to be resized in the middle of an optim")
        assert "parameters that are not in the model" in found["stray"]
        assert "nan" not in found["losses"]


# Elastic pools


def elastic_run(
    rank: int, world_size: int, ep_size: int, stage: int, options: dict[str, Any], first: int = 0, folder: str = ""
) -> dict[str, Any]:
    adaptation = dm.AdaptationConfig(3, 2, **options.get("adaptation", {}))
    model = TinyModel(ep_size, num_experts=options.get("num_experts", 3), num_slots=options["num_slots"])
    engine = dm.initialize(model, deepspeed_config(stage), adaptation)
    losses, sizes = [], []
    if first:
        engine.load_checkpoint(folder, first)
    for step in range(first, 18):
        losses += train(engine, range(step, step + 1), rank, world_size)
        sizes.append([layer.num_slots for layer in engine.layers.values()])
        if folder and not first and step + 1 in (7, 13):
            engine.save_checkpoint(folder)
    return {
        "losses": losses,
        "sizes": sizes,
        "live": {name: placement.live_ids for name, placement in engine.placements().items()},
        "events": [event.to_dict() for event in engine.take_events()],
        "weights": gathered(engine),
    }


ELASTIC = {"num_slots": 4, "adaptation": {"pool": "elastic"}}


@pytest.mark.parametrize("stage", (1, 3))
def test_an_elastic_pool_trains_like_one_that_was_large_enough(stage: int) -> None:
    elastic = run_ranks(elastic_run, 2, 1, stage, ELASTIC)[0]
    fixed = run_ranks(elastic_run, 2, 1, stage, {"num_slots": 32})[0]
    assert elastic["losses"] == pytest.approx(fixed["losses"], abs=FLOAT32)
    assert elastic["live"] == fixed["live"]
    assert all(len(ids) > 4 for ids in elastic["live"].values()), "the pool did not run out"
    assert all(torch.allclose(elastic["weights"][name], v, atol=5e-6, rtol=0) for name, v in fixed["weights"].items())
    assert elastic["sizes"][0] == [4, 4] and elastic["sizes"][-1] > [4, 4]
    resized = [event for event in elastic["events"] if event["layers"]["moe.0"]["num_slots_before"] == 4]
    assert resized[-1]["layers"]["moe.0"]["num_slots"] > 4 and resized[-1]["layers"]["moe.0"]["grown"]
    assert not any(layer["out_of_slots"] for event in elastic["events"] for layer in event["layers"].values())


def test_an_elastic_pool_doubles_at_once_and_stops_at_its_limit() -> None:
    options = {
        "num_slots": 4,
        "num_experts": 4,
        "adaptation": {"pool": "elastic", "rule": "split_all", "max_slots": 13},
    }
    found = run_ranks(elastic_run, 2, 2, 2, options)[0]
    large = run_ranks(elastic_run, 2, 2, 2, {**options, "num_slots": 12, "adaptation": {"rule": "split_all"}})[0]
    assert [sizes[0] for sizes in found["sizes"]] == [4, 4] + 16 * [12]
    first, second, third = (event["layers"]["moe.0"] for event in found["events"][:3])
    assert len(first["grown"]) == 4 and not first["out_of_slots"]
    assert second["out_of_slots"] and third["out_of_slots"] and second["live_after"] == 12
    assert found["losses"] == pytest.approx(large["losses"], abs=FLOAT32)


def test_an_elastic_pool_shrinks() -> None:
    options = {"num_slots": 32, "adaptation": {"pool": "elastic", "last_growth_step": 0}}
    found = run_ranks(elastic_run, 2, 2, 3, options)[0]
    fixed = run_ranks(elastic_run, 2, 2, 3, {"num_slots": 32, "adaptation": {"last_growth_step": 0}})[0]
    assert [sizes[0] for sizes in found["sizes"]] == [32, 32] + 16 * [4]
    assert found["losses"] == pytest.approx(fixed["losses"], abs=FLOAT32)


@pytest.mark.parametrize("num_slots", [4, 32], ids=["grown", "shrunk"])
def test_a_run_with_an_elastic_pool_is_resumed_bit_for_bit(tmp_path: Path, num_slots: int) -> None:
    options = {"num_slots": num_slots, "adaptation": {"pool": "elastic"}}
    want = run_ranks(elastic_run, 2, 2, 2, options, 0, f"{tmp_path}")[0]
    assert want["sizes"][12] != [num_slots, num_slots]
    for step in (7, 13):
        got = run_ranks(elastic_run, 2, 2, 2, options, step, f"{tmp_path}")[0]
        assert got["losses"] == want["losses"][step:]
        assert got["sizes"] == want["sizes"][step:] and got["live"] == want["live"]
        assert all(torch.equal(got["weights"][name], value) for name, value in want["weights"].items())
