"""How many slots an elastic pool should have."""

from types import SimpleNamespace

import pytest

from dynmoe_ds.adaptation import AdaptationConfig, AdaptationController, Plan, sizes_to_grow, sizes_to_shrink
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe import Placement
from tests.adaptation.examples import records


def pool(num_experts, num_slots, ep_size=1):
    return Placement.initial(num_experts, num_slots, ep_size)


def grown(record, placement, *, max_slots=None, step=0, **options):
    config = AdaptationConfig(1, 1, pool="elastic", max_slots=max_slots, **options)
    controller = AdaptationController(config)
    per_slot = {"a": frozenset({"strain"})}
    return sizes_to_grow(controller, {"a": record}, {"a": placement}, per_slot, step=step).get("a")


def test_a_pool_with_room_stays():
    assert grown(records([3, 3, 0, 3], num_unrouted=1, unrouted_sum=(1, 0)), pool(3, 4)) is None
    assert grown(records([3, 3, 3]), pool(3, 3)) is None, "nobody wants an expert"


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "size"),
    # One more than there are, and a third of them free beside it: 4 live need round(16/3), 8 live need round(32/3).
    [(3, 1, 5), (7, 1, 11), (2, 2, 4), (6, 2, 10), (8, 4, 12)],
)
def test_a_full_pool_grows_by_a_third_and_to_what_the_ranks_can_share(num_experts, ep_size, size):
    record = records([1] * num_experts, num_unrouted=1, unrouted_sum=(1, 0))
    assert grown(record, pool(num_experts, num_experts, ep_size)) == size


def test_a_pool_grows_as_far_as_all_splits_need():
    record = records([1] * 6)
    assert grown(record, pool(6, 6, 2), rule="split_all") == 16  # 12 live
    assert grown(record, pool(6, 6, 2), rule="split_all", max_slots=9) == 8
    assert grown(record, pool(6, 6, 2), rule="split_all", max_slots=7) is None, "no more than 6 can be shared"
    assert grown(record, pool(6, 6, 2), rule="split_all", max_slots=4) is None, "a pool is never cut"


def test_no_pool_grows_after_the_last_growth_step():
    record = records([1, 1], num_unrouted=1, unrouted_sum=(1, 0))
    assert grown(record, pool(2, 2), last_growth_step=5, step=5) == 4
    assert grown(record, pool(2, 2), last_growth_step=5, step=6) is None


def test_a_pool_is_not_cut_by_a_rule_that_asks_for_room_and_then_does_not_use_it():
    def decide(seen, rooms):
        return Plan(items=()), frozenset({"a"} if rooms["a"].num_slots < 16 else ())

    controller = SimpleNamespace(config=AdaptationConfig(1, 1, pool="elastic"), decide=decide)
    assert sizes_to_grow(controller, {}, {"a": pool(2, 8)}, {}) == {"a": 8}


def test_a_slot_that_is_pruned_is_used_before_the_pool_grows():
    assert grown(records([4, 0], num_unrouted=1, unrouted_sum=(1, 0)), pool(2, 2)) is None


def test_pools_shrink_when_half_of_their_slots_would_do():
    placements = {"half": pool(6, 16), "more": pool(7, 16), "shared": pool(3, 12, 4), "one": pool(1, 4)}
    assert sizes_to_shrink(placements) == {"half": 8, "shared": 4, "one": 2}


def test_sizes_come_to_rest():
    for num_experts in range(1, 40):
        size = grown(records([1] * num_experts, num_unrouted=1, unrouted_sum=(1, 0)), pool(num_experts, num_experts))
        assert not sizes_to_shrink({"a": pool(num_experts + 1, size)})
        (small,) = sizes_to_shrink({"a": pool(num_experts, 4 * num_experts + 4)}).values()
        assert num_experts < small
        assert not sizes_to_shrink({"a": pool(num_experts, small)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "rubber"}, "adaptation.pool is 'rubber'. Use one of fixed, elastic."),
        ({"max_slots": 8}, "adaptation.max_slots is 8, but adaptation.pool is fixed: use elastic."),
        ({"pool": "elastic", "max_slots": 0}, "adaptation.max_slots is 0 but must be at least 1."),
    ],
)
def test_what_cannot_work_is_refused(options, words):
    with pytest.raises(ConfigError) as error:
        AdaptationConfig(1, 1, **options)
    assert error.value.faults == (words,)
