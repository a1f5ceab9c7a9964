import json

import pytest

from dynmoe_ds.adaptation import Move, Plan, Prune, Split, alarms, describe
from tests.adaptation.examples import placement, records
from tests.adaptation.test_plan import grow


def test_event_says_what_was_done():
    before = {"a": placement(0, 1, None, 2, ep_size=2), "full": placement(0, ep_size=1)}
    plan = Plan(items=(
        Prune(layer="a", expert_id=1),
        grow(slot=2, seeding="copy_nearest", parent_id=2),
        Move(layer="a", expert_id=0, to_slot=1),
    ))  # fmt: skip
    event = describe(
        plan,
        step=12,
        window_steps=4,
        rule="paper",
        records={"a": records([7, 0, 0, 3], num_tokens=8, num_unrouted=2), "full": records([8], num_tokens=8)},
        before=before,
        after=plan.apply(before),
        full=frozenset({"full"}),
        num_slots={"a": (4, 6), "full": (1, 1)},
    )
    as_dict = event.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert (as_dict["step"], as_dict["window_steps"], as_dict["rule"]) == (12, 4, "paper")
    assert as_dict["layers"]["a"] == {
        "pruned": [1],
        "grown": [{"expert_id": 10, "slot": 2, "rank": 1, "parent_id": 2, "seeding": "copy_nearest"}],
        "moved": [{"expert_id": 0, "from_slot": 0, "to_slot": 1}],
        "live_before": 3,
        "live_after": 3,
        "num_slots_before": 4,
        "num_slots": 6,
        "tokens_per_expert": {"0": 7, "1": 0, "2": 3},
        "num_tokens": 8,
        "num_unrouted": 2,
        "mean_k": 1.25,
        "out_of_slots": False,
    }
    assert as_dict["layers"]["full"]["out_of_slots"] is True
    (warning,) = as_dict["warnings"]
    assert warning.startswith("a: 25.0% of the tokens have no open gate.")


def test_moves_name_both_experts_of_an_exchange_and_follow_one_another():
    before = {"a": placement(0, 1, None, 2, ep_size=2)}
    plan = Plan(items=(
        grow(slot=2),
        Move(layer="a", expert_id=0, to_slot=3, exchange_with=2),
        Prune(layer="a", expert_id=1),
        Move(layer="a", expert_id=0, to_slot=1),
        Move(layer="a", expert_id=10, to_slot=0, exchange_with=2),
    ))  # fmt: skip
    record = {"a": records([7, 1, 0, 3])}
    event = describe(plan, step=1, window_steps=1, rule="paper", records=record, before=before,
                     after=plan.apply(before), full=frozenset(), num_slots={"a": (4, 4)})  # fmt: skip
    moved = event.layers["a"]["moved"]
    assert [tuple(one.values()) for one in moved] == [(0, 0, 3), (2, 3, 0), (0, 3, 1), (10, 2, 0), (2, 0, 2)]
    assert all(list(one) == ["expert_id", "from_slot", "to_slot"] for one in moved)


def test_split_is_a_birth_with_a_parent():
    before = {"a": placement(0, None, 1, None, ep_size=2, next_id=2)}
    plan = Plan(items=(
        Split(layer="a", parent_id=1, expert_id=2, slot=1),
        Split(layer="a", parent_id=0, expert_id=3, slot=3),
    ))  # fmt: skip
    event = describe(
        plan,
        step=5,
        window_steps=1,
        rule="split_all",
        records={"a": records([4, 0, 6, 0])},
        before=before,
        after=plan.apply(before),
        full=frozenset(),
        num_slots={"a": (4, 6)},
    )
    layer = event.to_dict()["layers"]["a"]
    assert layer["grown"] == [
        {"expert_id": 2, "slot": 1, "rank": 0, "parent_id": 1, "seeding": "split"},
        {"expert_id": 3, "slot": 3, "rank": 1, "parent_id": 0, "seeding": "split"},
    ]
    assert (layer["live_before"], layer["live_after"], layer["tokens_per_expert"]) == (2, 4, {"0": 4, "1": 6})


@pytest.mark.parametrize(
    ("record", "num_live", "expected"),
    [
        (records([50, 50], num_unrouted=5), 2, []),
        (records([50, 50], num_unrouted=6), 2, ["x: 6.0% of the tokens have no open gate."]),
        (records([90, 90]), 2, []),
        (records([90, 92]), 2, ["x: tokens use 1.82 of 2 experts on average, nearly all of them."]),
        (records([100]), 1, []),
        (records([99, 99], num_unrouted=10), 2, ["x: 10.0% of the tokens", "x: tokens use 1.98 of 2"]),
        (records([0, 0], num_tokens=0), 2, []),
    ],
)
def test_alarms(record, num_live, expected):
    found = alarms("x", record, num_live=num_live)
    assert len(found) == len(expected)
    assert all(message.startswith(start) for message, start in zip(found, expected, strict=True))
