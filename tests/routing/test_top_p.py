"""Top-p and its budget: worked examples, and the formulas as a loop in float64; what every router promises is in
tests/routing/test_contract.py."""

import math

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import BudgetConfig, RoutingRecords, TopPConfig, build_router, router_config, update_routers
from tests.helpers.softmax_reference import ACTIVE, check_routing, random_router, tokens

ALL_LIVE = torch.ones(4, dtype=torch.bool)


def by_hand(probabilities, **options):
    """The routing of one token with these probabilities over four live slots."""
    router = build_router(TopPConfig(**options), 1, 4).double()
    with torch.no_grad():
        router.weight.copy_(torch.tensor(probabilities, dtype=torch.float64).log()[:, None])
    return router(torch.ones(1, 1, dtype=torch.float64), ALL_LIVE, None)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("nulls", [(0, "zero"), (2, "zero"), (3, "identity")], ids=["", "zero", "identity"])
@pytest.mark.parametrize(
    "options",
    [{"p": 0.01}, {"p": 0.4}, {"p": 0.9}, {"p": 0.6, "renormalize": True}, {"p": 0.9, "k_max": 2}, {"p": 1.0}],
    ids=str,
)
def test_router_equals_the_formulas(options, nulls, padded):
    num_null, kind = nulls
    config = TopPConfig(
        **options, load_balance_weight=0.7, entropy_weight=0.3, num_null_experts=num_null, null_expert=kind
    )
    real = torch.arange(20) % 4 != 0 if padded else None
    check_routing(random_router(config), tokens(), ACTIVE, real, p=config.p)
    if config.p < 1:  # with p = 1 the rounding of a float32 sum decides about the last expert
        router, x = random_router(config, torch.float32), tokens(dtype=torch.float32)
        check_routing(router, x, ACTIVE, real, p=config.p)


@pytest.mark.parametrize("nulls", [0, 2])
def test_a_bias_changes_the_order_and_neither_weights_nor_what_is_held(nulls):
    router = random_router(TopPConfig(bias_update_speed=0.1, num_null_experts=nulls))
    biased = check_routing(router, tokens(), ACTIVE, None, p=0.4)
    router.selection_bias.zero_()
    assert not torch.equal(router(tokens(), ACTIVE, None).mask, biased.mask)


@pytest.mark.parametrize(
    ("p", "taken"),
    [
        (1e-9, [1]),  # at least one
        (0.4, [1]),
        (0.51, [1, 2]),
        (0.74, [1, 2]),
        (0.76, [1, 2, 0]),
        (0.99, [0, 1, 2, 3]),
    ],
)
def test_the_smallest_prefix_that_holds_p(p, taken):
    routing = by_hand([0.15, 0.5, 0.25, 0.1], p=p)
    assert sorted(routing.mask[0].nonzero().flatten().tolist()) == sorted(taken)
    expected = torch.tensor([0.15, 0.5, 0.25, 0.1], dtype=torch.float64) * routing.mask[0]
    torch.testing.assert_close(routing.weights[0], expected)


def test_exactly_p_is_enough_and_the_lower_slot_wins_a_tie():
    routing = by_hand([0.25, 0.25, 0.25, 0.25], p=0.5)
    assert routing.mask.tolist() == [[True, True, False, False]]


def test_weights_may_be_renormalised():
    routing = by_hand([0.15, 0.5, 0.25, 0.1], p=0.6, renormalize=True)
    torch.testing.assert_close(routing.weights[0], torch.tensor([0, 2 / 3, 1 / 3, 0], dtype=torch.float64))


def test_k_max_keeps_the_first_and_null_experts_besides():
    assert by_hand([0.15, 0.5, 0.25, 0.1], p=0.99, k_max=2).mask.tolist() == [[False, True, True, False]]
    router = build_router(TopPConfig(p=0.99, k_max=1, num_null_experts=1, null_expert="identity"), 1, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.3], [0.2]]).log())
        router.null_weight.copy_(torch.tensor([[0.5]]).log())
    routing = router(torch.ones(1, 1), torch.ones(2, dtype=torch.bool), None)
    assert routing.mask.tolist() == [[True, False]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.3, 0.0]]))
    torch.testing.assert_close(routing.passed_through, torch.tensor([0.5]))


def test_losses_of_a_flat_and_of_a_peaked_softmax():
    flat, peaked = by_hand([0.25] * 4, p=0.4), by_hand([0.999997, 1e-6, 1e-6, 1e-6], p=0.4)
    assert flat.aux_losses["entropy"].item() == pytest.approx(math.log(4))
    assert peaked.aux_losses["entropy"].item() == pytest.approx(0, abs=1e-4)
    # Two of four experts hold 0.4 of a flat softmax: 4 · (1 · 1/4 + 1 · 1/4). One holds it alone: 4 · 1.
    assert flat.aux_losses["load_balance"].item() == pytest.approx(2.0)
    assert peaked.aux_losses["load_balance"].item() == pytest.approx(4.0, abs=1e-4)


def steps(router, scale, num_steps, live, seed=0):
    """Mean k of optimiser steps of 256 tokens whose logits have the given standard deviation, one value per step."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(num_steps):
        hidden = scale * torch.randn(256, router.weight.shape[1], generator=generator)
        records = RoutingRecords.of(router(hidden, live, None), hidden, None)
        update_routers({"a": router}, {"a": records}, {"a": live})
        found.append(records.mean_k)
    return torch.tensor(found)


def budgeted(target_k, num_slots=16, warmup_steps=0, **options):
    budget = BudgetConfig(target_k=target_k, warmup_steps=warmup_steps)
    router = build_router(TopPConfig(budget=budget, **options), num_slots, num_slots)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_slots))  # the logits are the tokens' coordinates
    return router


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("target_k", [1.5, 4.0])
def test_a_budget_holds_mean_k_of_a_flat_and_of_a_peaked_softmax(target_k, scale):
    # At scale 6 the p for 4 experts is 0.996, and 0.01 more or less of p is worth experts.
    mean_k = steps(budgeted(target_k), scale, 200, torch.ones(16, dtype=torch.bool))[-60:]
    assert mean_k.mean().item() == pytest.approx(target_k, rel=0.03)
    assert mean_k.std().item() < 0.1 * target_k, "the loop swings"


def test_a_budget_follows_growth_and_pruning_within_k_max():
    router, live = budgeted(3.0, k_max=5), torch.arange(16) < 4
    for num_live in (4, 12, 6):
        live = torch.arange(16) < num_live
        mean_k = steps(router, 2.0, 120, live)[-40:]
        assert mean_k.mean().item() == pytest.approx(3.0, rel=0.03), num_live


def test_a_warm_up_from_above_k_max_does_not_pile_up_errors():
    router = budgeted(2.0, k_max=3, warmup_steps=60)  # from 8 of 16 experts, of which a token can take 3
    mean_k = steps(router, 2.0, 150, torch.ones(16, dtype=torch.bool))
    assert mean_k[40:60].mean() > 2.5
    assert mean_k[-40:].mean().item() == pytest.approx(2.0, rel=0.05)


def test_a_positive_control_lowers_p():
    router = budgeted(2.0, p=0.6)
    assert float(router.observables(torch.ones(16, dtype=torch.bool))["p"]) == pytest.approx(0.6)
    router.budget.control.fill_(math.log(6))
    # Odds of 0.6 are 1.5; a sixth of them is a probability of 0.2.
    assert float(router.observables(torch.ones(16, dtype=torch.bool))["p"]) == pytest.approx(0.2)
    check_routing(router.double(), tokens().repeat(1, 3)[:, :16], torch.ones(16, dtype=torch.bool), None, p=0.2)
    assert random_router(TopPConfig()).observables(ACTIVE) == {}


def test_presets():
    assert router_config("top_p") == TopPConfig()
    paper = dm.TopPConfig(p=0.4, renormalize=False, load_balance_weight=1e-2, entropy_weight=1e-4)
    assert paper == TopPConfig() and paper.budget is None and paper.k_max is None
    assert router_config("top_p_budget") == TopPConfig(budget=BudgetConfig(target_k=2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, "router.p is 0.0 but must be above 0 and at most 1."),
        ({"p": 1.5}, "router.p is 1.5 but must be above 0 and at most 1."),
        ({"p": float("nan")}, "router.p is nan but must be above 0 and at most 1."),
        (
            {"p": 1.0, "budget": BudgetConfig(target_k=2)},
            "router.p is 1 but a budget must start from a p below 1. Use 0.4, or leave it out.",
        ),
        ({"k_max": 0}, "router.k_max is 0 but must be at least 1."),
        (
            {"budget": BudgetConfig(target_k=1.0)},
            "router.budget.target_k is 1.0 but must be a finite number above 1.",
        ),
        ({"bias_update_speed": -0.1}, "router.bias_update_speed is -0.1 but must not be negative."),
        ({"entropy_weight": -1.0}, "router.entropy_weight is -1.0 but must not be negative."),
    ],
)
def test_values_that_cannot_work(options, message):
    assert TopPConfig(**options).faults() == [message]
    with pytest.raises(ConfigError) as caught:
        build_router(TopPConfig(**options), 3, 3)
    assert str(caught.value) == message


def test_null_experts_allow_less_than_one_expert_per_token():
    assert TopPConfig(budget=BudgetConfig(target_k=0.5), num_null_experts=2).faults() == []
