import pytest

from dynmoe_ds.errors import PlacementError
from dynmoe_ds.moe import Placement


def placement(*expert_ids: int | None, next_id: int = 9, ep_size: int = 1) -> Placement:
    return Placement(expert_ids=expert_ids, next_id=next_id, ep_size=ep_size)


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "expected"),
    [
        (4, 8, (0, None, 1, None, 2, None, 3, None)),
        (3, 8, (0, None, 1, None, None, 2, None, None)),
        (4, 4, (0, 1, 2, 3)),
        (1, 3, (0, None, None)),
        (2, 5, (0, None, 1, None, None)),
    ],
)
def test_experts_start_spread_over_the_pool(num_experts, num_slots, expected):
    start = Placement.initial(num_experts, num_slots, 1)
    assert start.expert_ids == expected
    assert start.next_id == num_experts


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "ep_size"), [(4, 8, 2), (4, 8, 4), (5, 16, 4), (6, 8, 2), (1, 4, 4)]
)
def test_ranks_start_with_equal_numbers(num_experts, num_slots, ep_size):
    start = Placement.initial(num_experts, num_slots, ep_size)
    counts = [0] * ep_size
    for slot in start.slots_by_id.values():
        counts[start.rank_of(slot)] += 1
    assert sum(counts) == num_experts and max(counts) - min(counts) <= 1
    assert start.expert_ids == Placement.initial(num_experts, num_slots, 1).expert_ids


def test_questions():
    p = placement(None, 7, 2, None, None, 4, ep_size=2)
    assert p.num_slots == 6
    assert p.slots_by_id == {2: 2, 4: 5, 7: 1} and p.live_ids == (2, 4, 7)
    assert p.free_slots == (0, 3, 4)
    assert p.slot_of(4) == 5
    assert [p.rank_of(slot) for slot in range(6)] == [0, 0, 0, 1, 1, 1]


def test_changes_give_new_placements_and_never_use_an_id_again():
    p = placement(0, None, 1, None, next_id=2)
    grown = p.with_new_expert(3)
    assert grown.expert_ids == (0, None, 1, 2) and grown.next_id == 3
    pruned = grown.without(2)
    assert pruned.expert_ids == p.expert_ids
    assert pruned.with_new_expert(3).expert_ids == (0, None, 1, 3)
    assert p.moved(1, 1).expert_ids == (0, 1, None, None)
    assert p == placement(0, None, 1, None, next_id=2)


def test_exchanged_experts_have_each_others_slots():
    p = placement(0, None, 1, 5, next_id=6)
    assert p.exchanged(0, 3, 5).expert_ids == (5, None, 1, 0) == p.exchanged(5, 0, 0).expert_ids
    assert p.exchanged(0, 3, 5).next_id == 6 and p == placement(0, None, 1, 5, next_id=6)


@pytest.mark.parametrize(
    ("p", "load", "slot"),
    [
        (placement(0, 1, None, 2, None, None, ep_size=2), {}, 4),  # rank 1 has fewer experts
        (placement(0, None, 1, None, ep_size=2), {0: 9, 2: 5}, 3),  # as many: the smaller load
        (placement(0, None, 1, None, ep_size=2), {0: 5, 2: 5}, 1),  # equal: the lowest slot
        (placement(0, 1, 2, None, ep_size=2), {0: 0, 1: 0, 2: 99}, 3),  # numbers come before load
        (placement(0, 1), {}, None),
    ],
)
def test_growth_goes_to_the_least_loaded_rank(p, load, slot):
    assert p.least_loaded_free_slot(load) == slot


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.slot_of(3), r"Expert 3 is not live\. Live experts: 0, 1\."),
        (lambda p: p.without(3), "Expert 3 is not live"),
        (lambda p: p.moved(3, 1), "Expert 3 is not live"),
        (lambda p: p.without(0).without(1), "Expert 1 is the last live expert and cannot be pruned"),
        (lambda p: p.with_new_expert(2), r"Slot 2 holds expert 1\. Free slots: 1\."),
        (lambda p: p.moved(0, 2), "Slot 2 holds expert 1"),
        (lambda p: p.moved(0, 0), "Slot 0 holds expert 0"),
        (lambda p: p.with_new_expert(3), "Slot 3 does not exist: the pool has slots 0 to 2"),
        (lambda p: p.moved(0, -1), "Slot -1 does not exist"),
        (lambda p: p.exchanged(3, 2, 1), r"Expert 3 is not live\. Live experts: 0, 1\."),
        (lambda p: p.exchanged(0, 2, 3), r"Expert 3 is not live\. Live experts: 0, 1\."),
        (lambda p: p.exchanged(0, 0, 0), r"Expert 0 cannot be exchanged with itself\. Name another live expert\."),
        (
            lambda p: p.exchanged(0, 1, 1),
            r"Expert 0 cannot be exchanged with expert 1 in slot 1, since expert 1 is in slot 2\. Name the expert that "
            r"holds the slot, or none if it is free\.",
        ),
        (lambda p: p.with_new_expert(1).with_new_expert(0), r"Slot 0 holds expert 0\. Free slots: none\."),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(PlacementError, match=message):
        change(placement(0, None, 1, next_id=2))


@pytest.mark.parametrize(
    ("ids", "num_slots", "expected"),
    [
        ((7, None, 2, None), 8, (7, None, None, None, 2, None, None, None)),
        ((7, None, 2, 5), 3, (7, 2, 5)),
        ((7, None, 2, None), 4, (7, None, 2, None)),
        ((None, 7, 2, None), 4, (None, 7, 2, None)),  # of the same size it stays as it is
    ],
)
def test_resized_keeps_the_order_and_spreads_evenly(ids, num_slots, expected):
    before = Placement(expert_ids=ids, next_id=9, ep_size=1)
    assert before.resized(num_slots) == Placement(expert_ids=expected, next_id=9, ep_size=1)


@pytest.mark.parametrize(
    ("ids", "num_slots", "expected"),
    [
        ((0, 1, 2, None, 5, None, None, None), 16, (0, None, 1, None, None, 2, None, None, 5, *(None,) * 7)),
        ((0, 1, 2, None, 5, None, None, None), 6, (0, 1, 2, 5, None, None)),
        ((0, 1, 2, 3, 5, None, None, None), 6, (0, 1, 2, 5, 3, None)),  # 3 does not fit beside 0, 1 and 2
        ((0, 1, 2, 3, None, None, None, None), 4, (0, 1, 3, 2)),
    ],
)
def test_resized_keeps_experts_on_their_ranks_as_far_as_they_fit(ids, num_slots, expected):
    before = Placement(expert_ids=ids, next_id=9, ep_size=2)
    assert before.resized(num_slots).expert_ids == expected


def test_resized_refuses_what_cannot_work():
    placement = Placement(expert_ids=(0, 1, 2, None), next_id=3, ep_size=2)
    with pytest.raises(PlacementError, match="A pool of 2 slots cannot hold the 3 live experts"):
        placement.resized(2)
    with pytest.raises(PlacementError, match="A pool of 5 slots cannot be shared evenly by 2 ranks"):
        placement.resized(5)


def test_only_keeps_slots():
    placement = Placement(expert_ids=(4, None, 1, 8), next_id=9, ep_size=1)
    assert placement.only((1, 4, 77)).expert_ids == (4, None, 1, None)
