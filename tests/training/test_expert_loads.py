import math

import pytest
import torch

from dynmoe_ds.moe import Placement
from dynmoe_ds.routing import RoutingRecords
from dynmoe_ds.training.expert_loads import ExpertLoads, load_entropy


def _records(tokens_per_slot: list[int], num_tokens: int, num_unrouted: int) -> RoutingRecords:
    return RoutingRecords(
        tokens_per_slot=torch.tensor(tokens_per_slot),
        num_tokens=torch.tensor(num_tokens),
        num_assignments=torch.tensor(sum(tokens_per_slot)),
        num_unrouted=torch.tensor(num_unrouted),
        unrouted_sum=torch.zeros(2, dtype=torch.float64),
    )


def _placement(*expert_ids: int | None, ep_size: int = 1) -> Placement:
    return Placement(expert_ids=expert_ids, next_id=9, ep_size=ep_size)


def test_loads_follow_experts_when_a_slot_changes_hands():
    """Slot 1 holds expert 1, which is pruned; expert 2 is born into slot 1."""
    loads = ExpertLoads()
    loads.add({"a": _records([10, 5, 0], 10, 1)}, {"a": _placement(0, 1, None)})
    now = {"a": _placement(0, 2, 3)}
    loads.add({"a": _records([6, 4, 0], 10, 0)}, now)
    assert loads.line(now) == {"a": {"load": {0: 16, 2: 4, 3: 0, 1: 5}, "num_tokens": 20, "num_unrouted": 1}}
    metrics = {metric.name: metric.value for metric in loads.metrics("moe")}
    # Four experts were live while tokens were counted; expert 3 took none.
    entropy = -sum(share * math.log(share) for share in (16 / 25, 5 / 25, 4 / 25)) / math.log(4)
    assert metrics == {
        "moe/mean_k/a": 25 / 20,
        "moe/unrouted_share/a": 1 / 20,
        "moe/busiest_share/a": 16 / 20,
        "moe/load_entropy/a": pytest.approx(entropy),
        "moe/mean_k": 25 / 20,
    }


def test_mean_k_is_the_mean_over_layers_and_free_slots_have_no_line():
    loads = ExpertLoads()
    now = {"a": _placement(0, None), "b": _placement(None, 4)}
    loads.add({"a": _records([8, 0], 8, 0), "b": _records([0, 4], 8, 4)}, now)
    metrics = {metric.name: metric.value for metric in loads.metrics("eval")}
    assert metrics["eval/mean_k"] == 0.75
    assert loads.line(now)["b"]["load"] == {4: 4}


def test_rows_are_those_of_the_ranks_on_which_experts_were():
    """Two slots a rank. Experts 0 and 1 with 6 tokens, and expert 2 with 2; then expert 1 moves to the second rank."""
    loads = ExpertLoads()
    loads.add({"a": _records([1, 5, 2, 0], 8, 0)}, {"a": _placement(0, 1, 2, None, ep_size=2)})
    assert loads.line({"a": _placement(0, 1, 2, None, ep_size=2)})["a"]["rows_per_rank"] == [6, 2]
    moved = {"a": _placement(0, None, 2, 1, ep_size=2)}
    loads.add({"a": _records([3, 0, 1, 4], 8, 0)}, moved)
    assert loads.line(moved) == {
        "a": {"load": {0: 4, 2: 3, 1: 9}, "num_tokens": 16, "num_unrouted": 0, "rows_per_rank": [9, 7]}
    }


def test_without_moe_layers_there_is_nothing_to_log():
    assert ExpertLoads().metrics("moe") == []
    assert ExpertLoads().line({}) == {}


def test_entropy_of_load_is_1_for_equal_and_0_for_one_busy_expert():
    assert load_entropy([7, 7, 7]) == pytest.approx(1.0)
    assert load_entropy([0, 9, 0, 0]) == 0.0
    assert load_entropy([4]) == 1.0
    assert load_entropy([3, 1, 0, 0]) == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4))


def test_a_layer_that_nobody_used_has_no_entropy():
    loads = ExpertLoads()
    loads.add({"a": _records([0, 0], 8, 8)}, {"a": _placement(0, 1)})
    assert {metric.name: metric.value for metric in loads.metrics("moe")} == {
        "moe/mean_k/a": 0.0,
        "moe/unrouted_share/a": 1.0,
        "moe/busiest_share/a": 0.0,
        "moe/mean_k": 0.0,
    }
