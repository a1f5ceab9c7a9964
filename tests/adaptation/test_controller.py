import pytest
import torch

from dynmoe_ds.adaptation import (
    AdaptationConfig,
    AdaptationController,
    Decision,
    Grow,
    Move,
    Prune,
    Split,
    register_rule,
    rules,
)
from dynmoe_ds.adaptation.controller import nearest_expert
from dynmoe_ds.errors import PlacementError, RoutingError
from dynmoe_ds.routing.records import pack
from tests.adaptation.examples import placement, records


def decide(record, pool, *, step: int = 0, min_experts: int | None = None, **options):
    controller = AdaptationController(AdaptationConfig(every_steps=1, window_steps=1, **options))
    bound = None if min_experts is None else {"a": min_experts}
    plan, full = controller.decide({"a": record}, {"a": pool}, step=step, min_experts=bound)
    return list(plan.items), full, plan.apply({"a": pool})["a"]


UNROUTED = {"num_unrouted": 3, "unrouted_sum": [0, 5]}


def test_slot_set_free_is_used_at_once():
    items, full, after = decide(records([5, 0, 3], **UNROUTED), placement(0, 1, 2, next_id=3))
    assert items[0] == Prune(layer="a", expert_id=1)
    grow = items[1]
    assert (grow.layer, grow.expert_id, grow.slot, grow.parent_id) == ("a", 3, 1, None)
    assert grow.gate_row.tolist() == [0, 1] and grow.seeding == "copy_nearest"
    assert len(items) == 2 and not full
    assert after.expert_ids == (0, 3, 2) and after.next_id == 4


def test_new_expert_goes_to_the_least_loaded_rank():
    pool = placement(0, 1, None, 2, None, None, next_id=3, ep_size=2)
    items, _, _ = decide(records([1, 1, 0, 100, 0, 0], **UNROUTED), pool)
    assert [item.slot for item in items] == [4]
    even = placement(0, None, 1, None, next_id=2, ep_size=2)
    assert decide(records([9, 0, 5, 0], **UNROUTED), even)[0][0].slot == 3
    assert decide(records([5, 0, 9, 0], **UNROUTED), even)[0][0].slot == 1


def test_load_of_a_pruned_expert_does_not_count():
    # After pruning expert 2 both ranks hold one expert, and the second has the smaller load.
    pool = placement(0, None, None, 1, 2, None, next_id=3, ep_size=2)
    items, _, _ = decide(records([20, 0, 0, 19, 1, 0], **UNROUTED), pool, prune_below_share=0.5)
    assert [type(item) for item in items] == [Prune, Grow] and items[1].slot == 4


def test_full_pool_is_reported():
    items, full, after = decide(records([5, 3], **UNROUTED), placement(0, 1))
    assert items == [] and full == {"a"} and after.expert_ids == (0, 1)


def test_layers_are_decided_on_their_own():
    controller = AdaptationController(AdaptationConfig(every_steps=1, window_steps=1))
    plan, full = controller.decide(
        {"a": records([5, 3], **UNROUTED), "b": records([5, 0]), "c": records([2, 0], **UNROUTED)},
        {"a": placement(0, 1), "b": placement(0, 1), "c": placement(0, None)},
    )
    assert [(type(item), item.layer) for item in plan.items] == [(Prune, "b"), (Grow, "c")]
    assert full == {"a"}


@pytest.mark.parametrize(("step", "grows"), [(0, True), (10, True), (11, False)])
def test_no_growth_after_the_last_growth_step(step, grows):
    record = records([5, 0, 0], **UNROUTED)
    items, _, _ = decide(record, placement(0, 1, None), step=step, last_growth_step=10)
    assert [type(item) for item in items] == [Prune, Grow][: 1 + grows]
    _, full, _ = decide(records([5, 3], **UNROUTED), placement(0, 1), step=step, last_growth_step=10)
    assert full == ({"a"} if grows else set())  # what nobody wants is not missing


@pytest.mark.parametrize(
    ("min_experts", "pruned"), [(None, [1, 3, 4]), (1, [1, 3, 4]), (3, [1, 4]), (4, [1]), (5, []), (9, [])]
)
def test_pruning_leaves_as_many_as_the_router_needs_and_spares_the_busiest(min_experts, pruned):
    # The mean is 20.2: experts 1, 3 and 4 have less than half of it; 4 and 1 the least, and of equals the older stays.
    record, pool = records([50, 2, 41, 5, 3]), placement(0, 1, 2, 3, 4, next_id=5)
    items, _, _ = decide(record, pool, min_experts=min_experts, prune_below_share=0.5)
    assert items == [Prune(layer="a", expert_id=expert_id) for expert_id in pruned]


def split(parent_id: int, expert_id: int, slot: int) -> Split:
    return Split(layer="a", parent_id=parent_id, expert_id=expert_id, slot=slot)


def test_all_split_the_busiest_first_as_long_as_there_are_slots():
    pool = placement(0, None, 1, None, 2, None, next_id=3, ep_size=2)
    items, full, after = decide(records([5, 0, 30, 0, 20, 0]), pool, rule="split_all")
    # Expert 2 is alone on the second rank, which gets the first child. Then both have two, and the first fewer tokens.
    assert items == [split(1, 3, 3), split(2, 4, 1), split(0, 5, 5)]
    assert not full and after.expert_ids == (0, 4, 1, 3, 2, 5)
    items, full, _ = decide(records([5, 0, 30, 20]), placement(0, None, 1, 2, next_id=3), rule="split_all")
    assert items == [split(1, 3, 1)] and full == {"a"}
    items, full, _ = decide(records([5, 30]), placement(0, 1), rule="split_all")
    assert items == [] and full == {"a"}


def test_children_go_where_the_halved_loads_are_least():
    # Both ranks have two experts. The first child goes to the second rank (60 < 100); with 30 of the tokens there and
    # three experts, the second child goes to the first.
    pool = placement(0, 1, None, 2, 3, None, next_id=4, ep_size=2)
    assert decide(records([50, 50, 0, 40, 20, 0]), pool, rule="split_all")[0] == [split(0, 4, 5), split(1, 5, 2)]


def test_slot_of_a_pruned_expert_takes_a_child():
    record = records([50, 1, 40], strain=[2.0, 9.0, 3.0])
    items, full, after = decide(record, placement(0, 1, 2, next_id=3), rule="split_strained", prune_below_share=0.1)
    assert items == [Prune(layer="a", expert_id=1), split(2, 3, 1)] and not full
    assert after.expert_ids == (0, 3, 2)


@pytest.mark.parametrize("rule", ["split_all", "split_strained", "split_loaded"])
def test_no_split_after_the_last_growth_step(rule):
    record, pool = records([50, 1, 40, 0], strain=[3.0, 1.0, 2.0, 0.0]), placement(0, 1, 2, None, next_id=3)
    options = {"rule": rule, "prune_below_share": 0.1, "last_growth_step": 10}
    assert [type(item) for item in decide(record, pool, step=10, **options)[0]][:2] == [Prune, Split]
    assert decide(record, pool, step=11, **options)[:2] == ([Prune(layer="a", expert_id=1)], frozenset())


def test_moves_come_last_on_what_is_left():
    pool = placement(0, 1, None, 2, 3, None, next_id=4, ep_size=2)
    record = records([50, 40, 0, 20, 1, 0], **UNROUTED)
    options = {"prune_below_share": 0.1, "rebalance_above": 1.1, "rebalance_cost": 0.02}
    # Expert 3 goes, the new one comes in its place: 90 and 20 tokens, and 40 on the other side leave 50 and 60.
    items, _, after = decide(record, pool, **options)
    assert [type(item) for item in items] == [Prune, Grow, Move]
    assert items[2] == Move(layer="a", expert_id=1, to_slot=5) and after.expert_ids == (0, None, None, 2, 4, 1)
    without = [type(item) for item in decide(record, pool, prune_below_share=0.1)[0]]
    assert without == [Prune, Grow], "nothing moves unless asked to"
    # Pruning can end growth, and moves go on.
    items, _, _ = decide(record, pool, step=5, last_growth_step=0, **options)
    assert [type(item) for item in items] == [Prune, Move]


@pytest.fixture
def own_rule(monkeypatch):
    """Splits expert 0."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    register_rule("first")(lambda record, pool, config: Decision(split_ids=(0,)))
    return "first"


def test_halves_of_a_split_count_half_of_its_load_each(own_rule):
    # 30 + 20 on the first rank and 30 + 30 on the second, which no exchange makes more even. Were the parent's 60 all
    # its own, or the child's too, there would be one.
    pool = placement(0, 1, 2, None, next_id=3, ep_size=2)
    items, _, _ = decide(records([60, 20, 30, 0]), pool, rule=own_rule, rebalance_above=1.0, rebalance_cost=0.0)
    assert items == [split(0, 3, 3)]


def test_an_expert_that_was_just_born_can_move(own_rule):
    # The child comes to the rank with fewer experts, and with 50 of its 101 tokens goes on to the other, which leaves
    # 51 and 70. The parent's 51 would leave 71. Exchanged for 10 it would leave 61 and 60, but that carries two.
    pool = placement(0, None, None, None, 1, 2, None, None, next_id=3, ep_size=2)
    items, _, after = decide(
        records([101, 0, 0, 0, 10, 10, 0, 0]), pool, rule=own_rule, rebalance_above=1.0, rebalance_cost=0.2
    )
    assert items == [split(0, 3, 1), Move(layer="a", expert_id=3, to_slot=6)]
    assert after.expert_ids == (0, None, None, None, 1, 2, 3, None)


def test_every_layer_is_rebalanced_on_its_own():
    config = AdaptationConfig(every_steps=1, window_steps=1, last_growth_step=0, rebalance_above=1.2)
    pool = placement(0, 1, None, None, ep_size=2)
    even, uneven = placement(0, None, 1, None, ep_size=2), records([30, 30, 0, 0])
    plan, full = AdaptationController(config).decide(
        {"a": uneven, "b": records([30, 0, 30, 0]), "c": uneven}, {"a": pool, "b": even, "c": pool}, step=1
    )
    assert plan.items == (Move(layer="a", expert_id=0, to_slot=2), Move(layer="c", expert_id=0, to_slot=2))
    assert not full


def test_own_rule_may_split_and_add(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    @register_rule("both")
    def both(record, pool, config):
        return Decision(split_ids=(1,), new_gate_row=torch.tensor([0.0, 1.0]))

    pool = placement(0, 1, None, None, next_id=2)
    first, second = decide(records([5, 8, 99, 99]), pool, rule="both", seeding="copy_most_loaded")[0]
    assert first == split(1, 2, 2)
    assert (second.expert_id, second.slot, second.parent_id) == (3, 3, 0)  # of 8 tokens each half has 4, expert 0 has 5
    items, full, _ = decide(records([5, 8, 0]), placement(0, 1, None, next_id=2), rule="both")
    assert items == [split(1, 2, 2)] and full == {"a"}


def test_records_without_strain_are_refused_where_the_rule_needs_it():
    with pytest.raises(RoutingError, match=r"split_strained, but the records of a hold no strain\. Record with Step"):
        decide(records([5, 8]), placement(0, 1), rule="split_strained")


def test_parents():
    pool = placement(4, None, 7, 2)
    parents = {
        seeding: decide(records([5, 0, 9, 9], **UNROUTED), pool, seeding=seeding)[0][0].parent_id
        for seeding in ("copy_most_loaded", "copy_nearest", "mean", "fresh")
    }
    # The oldest of the equally loaded; the nearest is found when the gate rows are read.
    assert parents == {"copy_most_loaded": 2, "copy_nearest": None, "mean": None, "fresh": None}


def test_deciding_is_pure():
    record, pool = records([5, 0, 3], **UNROUTED), placement(0, 1, 2)
    before = pack({"a": record})
    first, second = (decide(record, pool)[0] for _ in range(2))
    assert [item.to_dict() for item in first] == [item.to_dict() for item in second]
    assert torch.equal(pack({"a": record}), before)
    assert pool == placement(0, 1, 2)


def test_nearest_expert():
    rows = torch.tensor([[1.0, 0.0], [99.0, 99.0], [0.0, 50.0], [0.0, 2.0], [0.0, 0.0]])
    pool = placement(4, None, 7, 3, 9)
    assert nearest_expert(torch.tensor([5.0, 1.0]), rows, pool) == 4
    assert nearest_expert(torch.tensor([0.1, 1.0]), rows, pool) == 3  # lengths do not matter; the oldest of equals
    assert nearest_expert(torch.tensor([-1.0, -1.0]), rows, pool) == 9  # the row of zeros has cosine 0
    with pytest.raises(PlacementError, match="There is no live expert to copy"):
        nearest_expert(torch.ones(2), rows, placement(None, None, None, None, None))
