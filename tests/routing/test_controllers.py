"""Which layer's controller learns what from a step's records; the arithmetic of a budget is in test_budget.py."""

import copy
from dataclasses import replace

import pytest
import torch

from dynmoe_ds.routing import BudgetConfig, RoutingRecords, TopAnyConfig, TopPConfig, build_router, update_routers

SLOTS = 6
LAYER, MODEL = BudgetConfig(target_k=2.0), BudgetConfig(target_k=2.0, scope="model")


def records(num_tokens, num_assignments, tokens_per_slot=None):
    counts = torch.zeros(SLOTS, dtype=torch.int64) if tokens_per_slot is None else torch.tensor(tokens_per_slot)
    zeros = RoutingRecords.zeros(SLOTS, 4, {}, torch.device("cpu"))
    return replace(
        zeros,
        tokens_per_slot=counts,
        num_tokens=torch.tensor(num_tokens),
        num_assignments=torch.tensor(num_assignments),
    )


def live(num_live):
    return torch.arange(SLOTS) < num_live


def top_any(budget=None, **options):
    return build_router(TopAnyConfig(budget=budget, **options), 4, SLOTS)


def step(routers, counts, num_live):
    """One optimiser step; counts: tokens and assignments by layer."""
    update_routers(
        routers,
        {name: records(*counts[name]) for name in routers},
        {name: live(num_live[name]) for name in routers},
    )


def control(router):
    return router.budget.control.item()


def by_hand(error_sum):
    return 0.8 / 4**0.5 * error_sum  # the gain of top-any for four dimensions


def test_every_layer_is_held_by_itself():
    routers = {"a": top_any(LAYER), "b": top_any(LAYER), "none": top_any()}
    sums = {"a": 0.0, "b": 0.0}
    for a, b in ((30, 10), (12, 22), (25, 20)):  # assignments of 10 and of 8 tokens
        step(routers, {"a": (10, a), "b": (8, b), "none": (8, 48)}, {"a": 4, "b": 6, "none": 6})
        sums["a"] += (a / 10 - 2) / 4
        sums["b"] += (b / 8 - 2) / 6
        assert control(routers["a"]) == pytest.approx(by_hand(sums["a"]), rel=1e-12)
        assert control(routers["b"]) == pytest.approx(by_hand(sums["b"]), rel=1e-12)
    assert routers["none"].budget is None


def test_the_model_is_held_by_the_mean_of_its_layers():
    routers = {"a": top_any(MODEL), "b": top_any(MODEL), "c": top_any(MODEL)}
    total = 0.0
    for a, b, c in ((30, 10, 5), (20, 22, 16), (35, 1, 9)):
        step(routers, {"a": (10, a), "b": (10, b), "c": (5, c)}, {"a": 4, "b": 5, "c": 6})
        total += ((a / 10 + b / 10 + c / 5) / 3 - 2) / 5  # five experts are live in the mean layer
        (shared,) = {control(router) for router in routers.values()}
        assert shared == pytest.approx(by_hand(total), rel=1e-12)
    step(routers, {"a": (10, 40), "b": (10, 0), "c": (5, 10)}, {"a": 4, "b": 5, "c": 6})
    assert control(routers["a"]) == pytest.approx(by_hand(total), rel=1e-12), "layers differ but their mean is right"


def test_only_equal_budgets_share_a_control_value():
    other = BudgetConfig(target_k=3.0, scope="model")
    routers = {"a": top_any(MODEL), "b": top_any(other), "c": top_any(MODEL), "d": top_any(LAYER), "e": top_any(other)}
    step(
        routers,
        {"a": (10, 30), "b": (10, 40), "c": (10, 20), "d": (10, 40), "e": (10, 30)},
        dict.fromkeys(routers, 5),
    )
    found = {name: control(router) for name, router in routers.items()}
    expected = {"a": 0.5, "c": 0.5, "b": 0.5, "e": 0.5, "d": 2.0}
    assert found == {name: pytest.approx(by_hand(error / 5), rel=1e-12) for name, error in expected.items()}


def test_routers_of_two_kinds_share_the_error_and_keep_their_gains():
    routers = {"any": top_any(MODEL), "p": build_router(TopPConfig(budget=MODEL), 4, SLOTS)}
    step(routers, {"any": (10, 40), "p": (10, 20)}, {"any": 5, "p": 5})
    gain = routers["p"].budget.proportional_gain + routers["p"].budget.integral_gain
    assert control(routers["any"]) == pytest.approx(by_hand(1 / 5), rel=1e-12)
    assert control(routers["p"]) == pytest.approx(gain / 5, rel=1e-12)


def test_a_layer_without_tokens_keeps_its_state():
    routers = {"a": top_any(LAYER), "b": top_any(LAYER, bias_update_speed=0.5)}
    step(routers, {"a": (10, 30), "b": (10, 30)}, {"a": 5, "b": 5})
    before = copy.deepcopy(routers["b"].state_dict())
    update_routers(
        routers,
        {"a": records(10, 30), "b": records(0, 0, [3, 0, 0, 0, 0, 0])},
        {"a": live(5), "b": live(5)},
    )
    after = routers["b"].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert routers["a"].budget.num_updates.item() == 2


def test_a_layer_without_tokens_moves_with_the_others_of_its_model():
    routers = {"a": top_any(MODEL), "b": top_any(MODEL)}
    step(routers, {"a": (10, 40), "b": (0, 0)}, {"a": 4, "b": 6})
    assert control(routers["a"]) == control(routers["b"]) == pytest.approx(by_hand(2 / 4), rel=1e-12)
    step(routers, {"a": (0, 0), "b": (0, 0)}, {"a": 4, "b": 6})
    assert [router.budget.num_updates.item() for router in routers.values()] == [1, 1]


def test_a_step_without_tokens_or_without_routers_changes_nothing():
    router = top_any(LAYER)
    step({"a": router}, {"a": (0, 0)}, {"a": 4})
    assert control(router) == 0.0 and router.budget.num_updates.item() == 0
    update_routers({}, {}, {})


def test_routers_get_their_records():
    router = top_any(bias_update_speed=0.25)
    assert router.has_controller and not top_any().has_controller
    update_routers({"a": router}, {"a": records(9, 9, [5, 1, 3, 0, 0, 0])}, {"a": live(3)})
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0]


def test_padding_is_no_token():
    router = top_any(BudgetConfig(target_k=1.0))
    active, hidden = live(4), torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.threshold.fill_(-3.0)
        router.budget.control.fill_(-2.0)
        router.weight.copy_(torch.eye(SLOTS, 4))
    real = torch.arange(12) < 5
    seen = RoutingRecords.of(router(hidden, active, real), hidden, real)
    assert (int(seen.num_tokens), int(seen.num_assignments)) == (5, 20), "all gates are open"
    update_routers({"a": router}, {"a": seen}, {"a": active})
    assert control(router) == pytest.approx(by_hand((4 - 1) / 4), rel=1e-12)


def test_updates_carry_no_graph():
    router = top_any(LAYER)
    hidden = torch.randn(8, 4, requires_grad=True)
    seen = RoutingRecords.of(router(hidden, live(4), None), hidden, None)
    update_routers({"a": router}, {"a": seen}, {"a": live(4)})
    assert not any(buffer.requires_grad for buffer in router.buffers())
