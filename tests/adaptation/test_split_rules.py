import pytest

from dynmoe_ds.adaptation import AdaptationConfig, Decision, split_all, split_loaded, split_strained
from tests.adaptation.examples import placement, records

POOL = placement(4, None, 7, 2)  # expert 4 in slot 0, 7 in slot 2, 2 in slot 3


def decide(rule, tokens_per_slot, strain=(0, 0, 0, 0), pool=POOL, num_tokens=100, **options) -> Decision:
    record = records(tokens_per_slot, strain=strain, num_tokens=num_tokens, num_unrouted=3, unrouted_sum=[1, 0])
    decision = rule(record, pool, AdaptationConfig(every_steps=1, window_steps=1, **options))
    assert decision.new_gate_row is None
    return decision


@pytest.mark.parametrize(
    ("tokens_per_slot", "options", "pruned", "split"),
    [
        ([5, 0, 1, 3], {}, (), (4, 2, 7)),
        ([3, 0, 9, 3], {}, (), (7, 2, 4)),  # of equals the oldest first
        ([5, 0, 0, 3], {}, (7,), (4, 2)),
        ([30, 0, 1, 5], {"prune_below_share": 0.1}, (7,), (4, 2)),
        ([0, 0, 0, 0], {}, (4, 7), (2,)),
    ],
)
def test_all_that_stay_are_split(tokens_per_slot, options, pruned, split):
    decision = decide(split_all, tokens_per_slot, **options)
    assert (decision.pruned_ids, decision.split_ids) == (pruned, split)


@pytest.mark.parametrize(
    ("tokens_per_slot", "strain", "options", "pruned", "split"),
    [
        ([5, 0, 1, 3], [0.1, 0, 0.3, 0.2], {}, (), (7,)),
        ([5, 0, 1, 3], [0.3, 0, 0.3, 0.3], {}, (), (2,)),  # the oldest of equals
        ([5, 0, 1, 3], [0.1, 9.0, 0.0, 0.2], {}, (), (2,)),  # a free slot has no say
        ([50, 0, 1, 30], [0.1, 0, 0.9, 0.2], {"prune_below_share": 0.1}, (7,), (2,)),
        ([5, 0, 1, 3], [0, 0, 0, 0], {}, (), ()),
    ],
)
def test_the_one_of_greatest_strain_is_split(tokens_per_slot, strain, options, pruned, split):
    decision = decide(split_strained, tokens_per_slot, strain, **options)
    assert (decision.pruned_ids, decision.split_ids) == (pruned, split)


@pytest.mark.parametrize(
    ("tokens_per_slot", "options", "pruned", "split"),
    [
        ([30, 0, 30, 30], {}, (), ()),
        ([45, 0, 30, 15], {}, (), ()),  # the mean is 30: 45 is not more than 1.5 times it
        ([46, 0, 30, 14], {}, (), (4,)),
        ([44, 0, 41, 5], {"split_above_load": 1.2}, (), (4, 7)),
        ([20, 0, 80, 2], {"prune_below_share": 0.1}, (2,), (7,)),  # the mean is that of all that were live
        ([31, 0, 29, 0], {}, (2,), (4,)),
    ],
)
def test_those_above_the_load_are_split(tokens_per_slot, options, pruned, split):
    decision = decide(split_loaded, tokens_per_slot, **options)
    assert (decision.pruned_ids, decision.split_ids) == (pruned, split)


@pytest.mark.parametrize("rule", [split_all, split_strained, split_loaded])
def test_window_without_tokens_changes_nothing(rule):
    decision = decide(rule, [0, 0, 0, 0], num_tokens=0)
    assert decision.pruned_ids == () and decision.split_ids == ()


def test_a_single_expert_splits():
    pool = placement(None, 3)
    assert decide(split_all, [0, 9], pool=pool).split_ids == (3,)
    assert decide(split_strained, [0, 9], strain=[0, 1.0], pool=pool).split_ids == (3,)
    assert decide(split_loaded, [0, 9], pool=pool).split_ids == ()
    assert decide(split_loaded, [0, 9], pool=pool, split_above_load=0.5).split_ids == (3,)
