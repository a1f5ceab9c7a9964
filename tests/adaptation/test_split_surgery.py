"""Splits on masters that are the weights themselves; tests/engine has those of DeepSpeed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Move, Plan, Prune, Split, operate, surgery
from dynmoe_ds.adaptation.splitting import split_direction, split_rows
from dynmoe_ds.errors import PlacementError, SurgeryError
from dynmoe_ds.experts import seeded_generator
from dynmoe_ds.moe import TokenSampler
from tests.adaptation.test_surgery import SLOTS, D, PlainMasters, config, grow, pool, whole
from tests.helpers.reference import assert_near
from tests.helpers.spawn import run_ranks

WIDTH = 12


def split(parent_id: int, slot: int = 5, expert_id: int = 3) -> Split:
    return Split(layer="a", parent_id=parent_id, expert_id=expert_id, slot=slot)


def tokens(num_tokens: int = 64, width: int = D, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def sampled(layer: dm.MoELayer, x: Tensor) -> TokenSampler:
    sampler = TokenSampler(1000)
    with dm.StepLedger(sampler=sampler):
        layer(x)
    return sampler


def after(items, ep_size: int = 1, x: Tensor | None = None, **options):
    """Everything before and after a plan on the pool of experts 0, 1, 2 in slots 0, 2, 4."""
    layer, masters = pool(ep_size)
    before = whole(layer, masters)
    sampler = None if x is None else sampled(layer, x)
    operate(Plan(items=tuple(items)), {"a": layer}, masters, config(**options), sampler)
    return before, whole(layer, masters), layer


def test_child_copies_the_parent_and_nobody_else_changes():
    before, now, layer = after([split(1)], split_separation=0.5)
    assert layer.placement.expert_ids == (0, None, 1, None, 2, 3)
    assert layer.active.nonzero().flatten().tolist() == [0, 2, 4, 5]
    others = [0, 1, 3, 4]
    for (name, kind), value in now.items():
        old = before[name, kind]
        assert torch.equal(value[others], old[others]), (name, kind)
        if name.startswith("experts."):
            assert torch.equal(value[[2, 5]], old[[2, 2]]), (name, kind)
        elif kind == "exp_avg":
            assert not value[[2, 5]].any() and old[2].any(), (name, kind)
        elif kind == "exp_avg_sq" or name == "router.threshold":
            assert torch.equal(value[[2, 5]], old[[2, 2]]), (name, kind)
        else:
            row = old[2].double()
            # Without a sample the direction is drawn from the layer's seed and the child's id.
            direction = split_direction(torch.zeros(0, D), row, seeded_generator(1, 3, "split"))
            torch.testing.assert_close(value[[2, 5]], split_rows(row, direction, 0.5).float())
            assert not torch.equal(value[2], value[5])


def test_rows_part_along_the_two_clusters_of_the_parents_own_tokens():
    layer, masters = pool()
    a, b, elsewhere = torch.tensor([[1.0, 1, 0, 0], [1.0, 0, 1, 0], [0.0, 0, 0, 1]])
    x = torch.cat([a + 0.02 * tokens(30), b + 0.02 * tokens(20, seed=1), elsewhere + 0.02 * tokens(90, seed=2)])
    with torch.no_grad():
        layer.router.weight[2] = torch.tensor([2.0, 1, 1, 0])
        layer.router.threshold[[0, 2, 4]] = torch.tensor([2.0, 0.5, -2.0])  # expert 1 takes the first two clouds only
    sampler = sampled(layer, x)
    operate(Plan(items=(split(1),)), {"a": layer}, masters, config(), sampler)
    rows = layer.router.weight.detach()
    torch.testing.assert_close(rows[[2, 5]].norm(dim=1), torch.full((2,), 6**0.5))
    parted = (rows[2] - rows[5]) / (rows[2] - rows[5]).norm()
    assert float(parted @ (a - b) / (a - b).norm()) > 0.99  # towards the larger cloud, which so stays with the parent
    counts = layer.router(x, layer.active, None).mask.sum(0)
    assert counts[[2, 5]].tolist() == [25, 25]


def test_children_share_the_load_of_their_parent():
    layer = dm.MoELayer(hidden_size=WIDTH, ffn_hidden_size=4, num_experts=3, num_slots=SLOTS, seed=0)
    masters, x = PlainMasters(layer), tokens(501, WIDTH) + 0.3 * tokens(1, WIDTH, seed=9)
    before = layer.router(x, layer.active, None).mask.sum(0)
    items = [split(i, slot, expert_id) for i, slot, expert_id in ((0, 1, 3), (1, 3, 4), (2, 5, 5))]
    operate(Plan(items=tuple(items)), {"a": layer}, masters, config(), sampled(layer, x))
    counts = layer.router(x, layer.active, None).mask.sum(0)
    for parent, child in ((0, 1), (2, 3), (4, 5)):
        assert counts[[parent, child]].tolist() == [int(before[parent]) // 2] * 2 and before[parent] > 100
    # On tokens that played no part the load is about halved.
    others = layer.router(tokens(501, WIDTH, seed=5) + 0.3 * tokens(1, WIDTH, seed=9), layer.active, None).mask.sum(0)
    shares = others / before[[0, 0, 2, 2, 4, 4]]
    assert shares.min() > 0.35 and shares.max() < 0.65


@pytest.mark.parametrize("num_chosen", [0, 1])
def test_parent_without_two_tokens_keeps_its_threshold(num_chosen):
    layer, masters = pool()
    with torch.no_grad():
        scores = torch.cosine_similarity(tokens(), layer.router.weight[2], dim=1).sort().values
        layer.router.threshold[2] = scores[-2:].mean() if num_chosen else 2.0
    sampler = sampled(layer, tokens())
    assert int(sampler.gather(layer)[1][:, 2].sum()) == num_chosen
    operate(Plan(items=(split(1),)), {"a": layer}, masters, config(), sampler)
    assert layer.router.threshold[2] == layer.router.threshold[5]
    assert layer.router.weight.isfinite().all()


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
def test_share_of_the_childs_units_starts_anew(expert):
    layer = dm.MoELayer(hidden_size=8, ffn_hidden_size=20, num_experts=1, num_slots=2, expert=expert, seed=0)
    masters = PlainMasters(layer)
    with torch.no_grad():
        for param, moments in masters.moments.items():
            param[0] += 0.5  # a mean that is not 0
            for value in moments.values():
                value[0] = torch.rand(value[0].shape, generator=torch.Generator().manual_seed(value.numel())) + 0.1
    before = whole(layer, masters)
    operate(Plan(items=(split(0, 1, 1),)), {"a": layer}, masters, config(split_reset_share=0.3))
    now = whole(layer, masters)
    units = None
    for (name, kind), value in now.items():
        if not name.startswith("experts."):
            continue
        parent, child = before[name, kind][0], value[1]
        assert torch.equal(value[0], parent), "the parent stays whole"
        if name == "experts.b2":
            assert torch.equal(child, parent)
            continue
        if name == "experts.w2":  # [D, F]: the units are its columns
            parent, child = parent.T, child.T
        changed = (child != parent).view(20, -1).all(1)
        assert changed.sum() == 6 and torch.equal((child != parent).view(20, -1).any(1), changed), (name, kind)
        units = changed if units is None else units
        assert torch.equal(changed, units), "the same units in all weights and moments"
        if kind == "weight":
            assert float(child[units].mean()) == pytest.approx(0.5, abs=0.3)
        elif kind == "exp_avg":
            assert not child[units].any()
        else:
            torch.testing.assert_close(child[units], parent.mean(0).expand_as(child[units]))


def test_splitting_all_alike_leaves_a_softmax_weighted_output_as_it_was():
    """But only if all double together: two copies of one expert have twice its odds against the others."""
    x = tokens(200, WIDTH).double()

    def outputs(*parents: int) -> tuple[Tensor, Tensor]:
        layer = dm.MoELayer(
            hidden_size=WIDTH, ffn_hidden_size=8, num_experts=3, num_slots=SLOTS, router="top_any_recommended", seed=0
        ).double()
        before = layer(x).detach()
        items = [split(parent, 2 * parent + 1, 3 + i) for i, parent in enumerate(parents)]
        operate(Plan(items=tuple(items)), {"a": layer}, PlainMasters(layer), config(split_separation=0.0))
        return before, layer(x).detach()

    before, all_split = outputs(0, 1, 2)
    assert_near(all_split, before)
    _, one_split = outputs(0)
    assert float((one_split - before).norm() / before.norm()) > 0.05


def test_slot_set_free_by_the_plan_takes_a_child_and_a_moved_parent_is_found():
    _, now, layer = after([Prune(layer="a", expert_id=0), split(2, slot=0)], x=tokens())
    assert layer.placement.expert_ids == (3, None, 1, None, 2, None)
    assert torch.equal(now["experts.w1", "weight"][0], now["experts.w1", "weight"][4])
    moved = after([Move(layer="a", expert_id=2, to_slot=1), split(2, slot=5)], x=tokens())[1]
    direct = after([split(2, slot=5)], x=tokens())[1]
    for key, value in direct.items():
        assert torch.equal(moved[key][[1, 5]], value[[4, 5]]), key


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([split(9)], PlacementError, "Expert 9 is not live. Live experts: 0, 1."),
        ([split(1, slot=0)], PlacementError, "Slot 0 holds expert 0"),
        ([split(1, expert_id=7)], PlacementError, "calls a new expert of a 7, but the next id is 3"),
        (
            [split(1), split(1, slot=1, expert_id=4)],
            SurgeryError,
            "a, expert 4: its parent 1 was split or added earlier in this plan, and nobody knows its tokens yet. Split "
            "it in a later plan.",
        ),
        ([split(1), split(3, slot=1, expert_id=4)], SurgeryError, "a, expert 4: its parent 3 was split or added"),
        ([grow("mean"), split(3, slot=1, expert_id=4)], SurgeryError, "a, expert 4: its parent 3 was split or added"),
    ],
    ids=["no parent", "taken slot", "wrong id", "split twice", "child of the plan", "new in the plan"],
)
def test_splits_that_contradict_the_pool_change_nothing(items, error, message):
    layer, masters = pool()
    before = whole(layer, masters)
    prune = Prune(layer="a", expert_id=2)  # comes first, and must not happen when what follows cannot
    with pytest.raises(error, match=message):
        operate(Plan(items=(prune, *items)), {"a": layer}, masters, config())
    assert layer.placement.live_ids == (0, 1, 2)
    assert all(torch.equal(value, before[key]) for key, value in whole(layer, masters).items())


def test_split_without_a_configuration_is_refused():
    layer, masters = pool()
    with pytest.raises(SurgeryError, match="a, expert 3: a plan that grows experts needs an AdaptationConfig"):
        operate(Plan(items=(split(1),)), {"a": layer}, masters, None)


def _on_ranks(rank: int, world_size: int) -> None:
    x = tokens(40)
    mine = x[: 0 if rank == 1 else 40]  # a rank without tokens takes part all the same
    items = [split(0, slot=1), Prune(layer="a", expert_id=1), split(2, slot=2, expert_id=4)]
    for sample, options in ((True, {}), (False, {"split_reset_share": 0.5})):
        _, got, layer = after(items, ep_size=world_size, x=mine if sample else None, **options)
        _, want, alone = after(items, x=x if sample else None, **options)
        assert layer.placement.expert_ids == alone.placement.expert_ids
        for key, value in got.items():
            torch.testing.assert_close(value, want[key], msg=f"{key} {options}")

    # Hardware that rounds differently must not make replicas differ: all take the values of the first rank.
    if rank == 1:
        exact = surgery.split_direction
        surgery.split_direction = lambda *args: exact(*args) * (1 + 1e-3)
    _, got, _ = after(items, ep_size=world_size)
    surgery.split_direction = split_direction
    _, want, _ = after(items)
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=0, msg=str(key))


def test_split_over_ranks_equals_one_rank_and_ranks_cannot_diverge():
    run_ranks(_on_ranks, 2)
