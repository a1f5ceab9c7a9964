"""Surgery with masters that are the weights themselves; tests/engine has those of DeepSpeed."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dynmoe_ds as dm
from dynmoe_ds.adaptation import AdaptationConfig, Grow, Move, Plan, Prune, operate
from dynmoe_ds.distributed import expert_parallel_group
from dynmoe_ds.errors import DivergenceError, PlacementError
from tests.helpers.spawn import run_ranks

D, SLOTS = 4, 6
ROW = torch.tensor([0.0, 0.6, 0.8, 0.0], dtype=torch.float64)
MOMENTS = ("exp_avg", "exp_avg_sq")


class PlainMasters:
    """Weights, and one tensor per moment beside each of them."""

    def __init__(self, layer: nn.Module) -> None:
        self.moments = {param: {name: torch.zeros_like(param) for name in MOMENTS} for param in layer.parameters()}

    def state_names(self) -> tuple[str, ...]:
        return MOMENTS

    def read(self, param: nn.Parameter, start: int, stop: int) -> dict[str, Tensor]:
        entries = {"weight": param.detach()} | self.moments[param]
        return {name: value[start:stop].clone() for name, value in entries.items()}

    def write(self, param: nn.Parameter, start: int, stop: int, state: dict[str, Tensor]) -> None:
        entries = {"weight": param.data} | self.moments[param]
        assert state.keys() == entries.keys()
        for name, value in entries.items():
            value[start:stop] = state[name]


def pool(ep_size: int = 1, router: str = "top_any") -> tuple[dm.MoELayer, PlainMasters]:
    """Experts 0, 1, 2 in slots 0, 2, 4 of six; every weight, moment and threshold differs."""
    layer = dm.MoELayer(
        hidden_size=D, ffn_hidden_size=3, num_experts=3, num_slots=SLOTS, ep_size=ep_size, router=router, seed=1
    )
    layer.ep_group = expert_parallel_group(ep_size) if ep_size > 1 else None
    masters = PlainMasters(layer)
    generator = torch.Generator().manual_seed(0)
    for name, param in layer.named_parameters():
        here = layer.local_slots if name.startswith("experts.") else range(SLOTS)
        for value in (param.data, *masters.moments[param].values()):
            full = torch.rand(SLOTS, *value.shape[1:], generator=generator) + 0.1
            value.copy_((full * layer.active.view(-1, *[1] * (full.dim() - 1)))[here.start : here.stop])
    return layer, masters


def whole(layer: dm.MoELayer, masters: PlainMasters) -> dict[tuple[str, str], Tensor]:
    """All slots of every weight and moment. Collective for an expert-parallel layer."""
    found = {}
    for name, param in layer.named_parameters():
        for kind, value in masters.read(param, 0, param.shape[0]).items():
            if name.startswith("experts.") and layer.ep_size > 1:
                parts = [torch.empty_like(value) for _ in range(layer.ep_size)]
                dist.all_gather(parts, value, group=layer.ep_group)
                value = torch.cat(parts)
            found[name, kind] = value
    return found


def grow(seeding: str, slot: int = 5, parent_id: int | None = None, expert_id: int = 3, row: Tensor = ROW) -> Grow:
    return Grow(layer="a", expert_id=expert_id, slot=slot, gate_row=row, seeding=seeding, parent_id=parent_id)


def config(**options) -> AdaptationConfig:
    return AdaptationConfig(every_steps=1, window_steps=1, **options)


def after(items, ep_size: int = 1, **options):
    """Everything before and after a plan, and the plan as it was carried out."""
    layer, masters = pool(ep_size)
    before = whole(layer, masters)
    done = operate(Plan(items=tuple(items)), {"a": layer}, masters, config(**options))
    return before, whole(layer, masters), layer, done


def test_pruning_leaves_zeros_and_touches_nothing_else():
    before, now, layer, _ = after([Prune(layer="a", expert_id=1)])
    assert layer.active.nonzero().flatten().tolist() == [0, 4]
    for key, value in now.items():
        assert before[key][2].any() and not value[2].any(), key
        assert torch.equal(value[[0, 1, 3, 4, 5]], before[key][[0, 1, 3, 4, 5]]), key


def test_moving_carries_weights_moments_and_router_rows():
    before, now, layer, _ = after([Move(layer="a", expert_id=1, to_slot=5)])
    assert layer.placement.expert_ids == (0, None, None, None, 2, 1)
    for key, value in now.items():
        assert torch.equal(value[5], before[key][2]) and not value[2].any(), key


def test_an_exchange_carries_weights_moments_and_router_rows_both_ways():
    before, now, layer, _ = after([Move(layer="a", expert_id=1, to_slot=4, exchange_with=2)])
    assert layer.placement.expert_ids == (0, None, 2, None, 1, None)
    for key, value in now.items():
        assert not torch.equal(before[key][2], before[key][4]), key
        assert torch.equal(value[[0, 1, 4, 3, 2, 5]], before[key]), key


def test_an_expert_that_was_just_born_can_be_moved():
    items = [grow("fresh"), Move(layer="a", expert_id=3, to_slot=0, exchange_with=0)]
    _, born, _, _ = after(items[:1])
    _, now, layer, _ = after(items)
    assert layer.placement.expert_ids == (3, None, 1, None, 2, 0)
    for key, value in now.items():
        assert torch.equal(value[[5, 1, 2, 3, 4, 0]], born[key]), key


@pytest.mark.parametrize("seeding", ["copy_nearest", "copy_most_loaded", "mean", "fresh"])
@pytest.mark.parametrize("new_threshold", ["zero", "mean_of_live"])
def test_growth(seeding, new_threshold):
    parent = 1 if seeding == "copy_most_loaded" else None
    item = grow(seeding, parent_id=parent)
    before, now, layer, done = after([item], noise=0.0, new_threshold=new_threshold)
    assert layer.placement.expert_ids == (0, None, 1, None, 2, 3)
    live = [0, 2, 4]
    fresh = layer.experts.initial(1, 3)
    if seeding == "copy_nearest":
        rows = before["router.weight", "weight"][live].double()
        parent = int((rows @ ROW / rows.norm(dim=1)).argmax())
        assert done.items[0].parent_id == parent
    for (name, kind), value in now.items():
        old = before[name, kind]
        assert torch.equal(value[:5], old[:5]), name
        mean = old[live].mean(0)
        if name == "router.weight" and kind == "weight":
            want = ROW.float()
        elif name.startswith("router."):
            keeps_mean = kind == "exp_avg_sq" or (kind == "weight" and new_threshold == "mean_of_live")
            want = mean if keeps_mean else torch.zeros_like(mean)
        elif parent is not None:
            want = old[2 * parent]
        elif seeding == "mean" or kind == "exp_avg_sq":
            want = mean
        else:
            want = fresh[name.removeprefix("experts.")] if kind == "weight" else torch.zeros_like(mean)
        torch.testing.assert_close(value[5], want, msg=f"{name} {kind}")


def test_noise_is_a_fraction_of_the_copied_tensor_and_its_own_for_every_expert():
    items = [grow("copy_most_loaded", parent_id=0), grow("copy_most_loaded", slot=1, parent_id=0, expert_id=4)]
    before, now, _, _ = after(items, noise=0.5)
    again = after(items, noise=0.5)[1]
    for (name, kind), value in now.items():
        assert torch.equal(value, again[name, kind])
        if not name.startswith("experts."):
            continue
        parent = before[name, kind][0]
        if kind != "weight":
            assert torch.equal(value[5], parent) and torch.equal(value[1], parent)
            continue
        assert not torch.equal(value[5], value[1])
        ratio = (value[[1, 5]] - parent).square().mean().sqrt() / parent.std(correction=0)
        assert 0.25 < ratio < 0.8, name  # 24 draws


def test_slot_set_free_by_the_plan_is_filled_by_it():
    _, now, layer, _ = after([Prune(layer="a", expert_id=0), grow("copy_most_loaded", slot=0, parent_id=2)], noise=0.0)
    assert layer.placement.expert_ids == (3, None, 1, None, 2, None)
    assert torch.equal(now["experts.w1", "weight"][0], now["experts.w1", "weight"][4])


def test_plan_that_contradicts_the_pool_changes_nothing():
    layer, masters = pool()
    before = whole(layer, masters)
    bad = Plan(items=(Prune(layer="a", expert_id=0), Prune(layer="a", expert_id=9)))
    with pytest.raises(PlacementError, match="Expert 9 is not live"):
        operate(bad, {"a": layer}, masters, None)
    assert layer.placement.live_ids == (0, 1, 2)
    assert all(torch.equal(value, before[key]) for key, value in whole(layer, masters).items())


def _on_ranks(rank: int, world_size: int) -> None:
    plans = [
        [Prune(layer="a", expert_id=2), Move(layer="a", expert_id=0, to_slot=4)],
        [Move(layer="a", expert_id=0, to_slot=4, exchange_with=2)],
        [
            grow("fresh"),
            Move(layer="a", expert_id=3, to_slot=0, exchange_with=0),
            Move(layer="a", expert_id=0, to_slot=1),
        ],
        *([grow(seeding), Prune(layer="a", expert_id=0)] for seeding in ("copy_nearest", "mean", "fresh")),
        [grow("copy_most_loaded", parent_id=0)],
    ]
    for items in plans:
        _, got, layer, done = after(items, ep_size=world_size)
        _, want, alone, done_alone = after(items)
        assert layer.placement.expert_ids == alone.placement.expert_ids
        assert done.fingerprint() == done_alone.fingerprint()
        for key, value in got.items():
            torch.testing.assert_close(value, want[key], msg=f"{items} {key}")

    layer, masters = pool(world_size)
    before = whole(layer, masters)
    partner = 2 if rank else None
    with pytest.raises(DivergenceError, match=r"The ranks disagree on the plan\. item 0 is .*exchange_with"):
        operate(
            Plan(items=(Move(layer="a", expert_id=0, to_slot=4, exchange_with=partner),)), {"a": layer}, masters, None
        )
    row = torch.nextafter(ROW, ROW + 1) if rank else ROW
    with pytest.raises(DivergenceError, match=r"The ranks disagree on the plan\. item 0 is .*gate_row_sha256"):
        operate(Plan(items=(grow("mean", row=row),)), {"a": layer}, masters, config())
    assert layer.placement.live_ids == (0, 1, 2)
    assert all(torch.equal(value, before[key]) for key, value in whole(layer, masters).items())


def test_surgery_over_ranks_equals_one_rank_and_different_plans_are_refused():
    run_ranks(_on_ranks, 2)
