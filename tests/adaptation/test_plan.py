import json

import pytest
import torch

from dynmoe_ds.adaptation import Grow, Move, Plan, Prune, Split
from dynmoe_ds.errors import PlacementError
from tests.adaptation.examples import placement

ROW = torch.tensor([0.6, 0.8], dtype=torch.float64)


def grow(slot: int = 1, expert_id: int = 10, row: torch.Tensor = ROW, **changes) -> Grow:
    values = {"layer": "a", "expert_id": expert_id, "slot": slot, "gate_row": row, "seeding": "mean", "parent_id": None}
    return Grow(**(values | changes))


def split(slot: int = 1, expert_id: int = 10, parent_id: int = 5, layer: str = "a") -> Split:
    return Split(layer=layer, parent_id=parent_id, expert_id=expert_id, slot=slot)


def test_items_are_applied_in_order():
    plan = Plan(items=(
        Prune(layer="a", expert_id=5),
        grow(slot=0),
        Move(layer="a", expert_id=6, to_slot=1),
        Prune(layer="b", expert_id=1),
    ))  # fmt: skip
    before = {"a": placement(5, None, 6), "b": placement(0, 1), "c": placement(3)}
    after = plan.apply(before)
    assert after["a"].expert_ids == (10, 6, None) and after["a"].next_id == 11
    assert after["b"].expert_ids == (0, None) and after["c"] is before["c"]
    assert before["a"] == placement(5, None, 6)
    assert plan.of_layer("b") == plan.items[3:] and plan.of_layer("c") == ()


def move(expert_id: int = 5, to_slot: int = 2, exchange_with: int | None = 6, layer: str = "a") -> Move:
    return Move(layer=layer, expert_id=expert_id, to_slot=to_slot, exchange_with=exchange_with)


def test_an_exchange_is_applied_between_other_items():
    plan = Plan(items=(Prune(layer="a", expert_id=7), move(), Move(layer="a", expert_id=6, to_slot=3)))
    assert plan.apply({"a": placement(5, None, 6, 7)})["a"].expert_ids == (None, None, 5, 6)


@pytest.mark.parametrize(
    "items",
    [
        (Prune(layer="a", expert_id=9),),
        (Prune(layer="a", expert_id=5), Prune(layer="a", expert_id=5)),
        (Prune(layer="a", expert_id=5), Prune(layer="a", expert_id=6)),
        (grow(slot=0),),
        (grow(slot=1), grow(slot=1, expert_id=11)),
        (Move(layer="a", expert_id=5, to_slot=2),),
        (Move(layer="a", expert_id=5, to_slot=3),),
        (move(to_slot=1),),
        (move(exchange_with=5, to_slot=0),),
        (move(), move()),
        (split(slot=0),),
        (split(parent_id=9),),
        (Prune(layer="a", expert_id=5), split()),
    ],
    ids=[
        "not live",
        "pruned twice",
        "last expert",
        "taken",
        "taken by the plan",
        "onto an expert",
        "no such slot",
        "exchange in a free slot",
        "exchange with itself",
        "exchanged twice",
        "split into a taken slot",
        "split of nobody",
        "split of a pruned expert",
    ],
)
def test_contradictions_are_refused(items):
    with pytest.raises(PlacementError):
        Plan(items=items).apply({"a": placement(5, None, 6)})


def test_new_expert_must_have_the_next_id():
    with pytest.raises(PlacementError, match="calls a new expert of a 12, but the next id is 10"):
        grow(expert_id=12).apply(placement(5, None))
    with pytest.raises(PlacementError, match="calls a new expert of a 12, but the next id is 10"):
        split(expert_id=12).apply(placement(5, None))


def test_parent_of_a_split_keeps_its_slot():
    after = Plan(items=(split(), split(slot=3, expert_id=11))).apply({"a": placement(5, None, 6, None)})
    assert after["a"].expert_ids == (5, 10, 6, 11) and after["a"].next_id == 12


@pytest.mark.parametrize(
    "other",
    [split(slot=2), split(expert_id=11), split(parent_id=6), split(layer="b")],
    ids=["slot", "id", "parent", "layer"],
)
def test_different_splits_have_different_fingerprints(other):
    assert Plan(items=(split(),)).fingerprint() == Plan(items=(split(),)).fingerprint()
    assert Plan(items=(split(),)).fingerprint() != Plan(items=(other,)).fingerprint()


@pytest.mark.parametrize(
    "other",
    [move(expert_id=7), move(to_slot=3), move(exchange_with=7), move(exchange_with=None), move(layer="b")],
    ids=["expert", "slot", "exchanged with another", "no exchange", "layer"],
)
def test_different_moves_have_different_fingerprints(other):
    assert Plan(items=(move(),)).fingerprint() == Plan(items=(move(),)).fingerprint()
    assert Plan(items=(move(),)).fingerprint() != Plan(items=(other,)).fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        grow(slot=2),
        grow(expert_id=11),
        grow(seeding="fresh"),
        grow(parent_id=5),
        grow(layer="b"),
        grow(row=torch.nextafter(ROW, ROW + 1)),
        Prune(layer="a", expert_id=10),
        Move(layer="a", expert_id=10, to_slot=1),
        split(),
    ],
    ids=["slot", "id", "seeding", "parent", "layer", "last bit of the gate row", "prune", "move", "split"],
)
def test_different_plans_have_different_fingerprints(other):
    assert Plan(items=(grow(),)).fingerprint() == Plan(items=(grow(row=ROW.clone()),)).fingerprint()
    assert Plan(items=(grow(),)).fingerprint() != Plan(items=(other,)).fingerprint()


def test_order_and_number_of_items_are_in_the_fingerprint():
    a, b = Prune(layer="a", expert_id=1), Prune(layer="b", expert_id=1)
    prints = [json.dumps(Plan(items=items).fingerprint()) for items in ((), (a,), (a, b), (b, a))]
    assert len(set(prints)) == 4


def test_parent_can_be_filled_in():
    item = grow().with_parent(5)
    assert item.parent_id == 5 and item.slot == 1 and item.gate_row is ROW
