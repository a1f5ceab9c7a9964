"""Configuration and worked examples of the router; tests/moe/test_layer.py compares it with the formulas."""

from dataclasses import asdict, replace

import pytest
import torch

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import (
    BudgetConfig,
    RoutingRecords,
    TopAnyConfig,
    build_router,
    router_config,
    update_routers,
)

# Scores of the tokens below are their cosines with the axes.
TOKENS = torch.tensor([[3.0, 4.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])  # (0.6, 0.8, 0), (-1, 0, 0), (0, 0, 1)
ACTIVE = torch.tensor([True, True, False])


def route(*, training: bool = True, real=None, threshold=(0.0, 0.7, -2.0), **options):
    router = build_router(TopAnyConfig(**options), 3, 3).train(training)
    with torch.no_grad():
        router.weight.copy_(torch.diag(torch.tensor([5.0, 0.1, 7.0])))  # lengths do not matter
        router.threshold.copy_(torch.tensor(threshold))
    return router(TOKENS, ACTIVE, real)


def test_default_is_the_paper():
    assert asdict(TopAnyConfig()) == {
        "score": "cosine",
        "temperature": 1.0,
        "weighting": "average",
        "straight_through": "all_live",
        "training_fallback": "none",
        "fallback_by": "margin",
        "diversity_weight": 0.01,
        "simplicity_weight": 0.01,
        "load_balance_weight": 0.0,
        "load_balance_gradient": "gates",
        "efficiency_weight": 0.0,
        "price_weight": 0.0,
        "k_max": None,
        "budget": None,
        "bias_update_speed": 0.0,
    }
    assert not list(build_router(TopAnyConfig(), 4, 3).buffers())


def test_presets():
    code, best = router_config("top_any_authors_code"), router_config("top_any_recommended")
    assert list(code.aux_loss_weights().values()) == [0.01, 0.01, 0.01, 0.01, 0.0]
    assert (code.straight_through, code.training_fallback, code.weighting) == ("active_only", "none", "average")
    assert list(best.aux_loss_weights().values()) == [0.0, 0.0, 0.01, 0.0, 0.01 / 16]
    assert (best.score, best.temperature, best.weighting) == ("softmax", 1.0, "softmax")
    assert (best.straight_through, best.training_fallback) == ("all_live", "top_1")
    assert (code.fallback_by, best.fallback_by) == ("score", "margin")
    assert (code.load_balance_gradient, best.load_balance_gradient) == ("gates", "shares")
    assert router_config("top_any_budget") == replace(
        best, load_balance_gradient="gates", price_weight=0.0, budget=BudgetConfig(target_k=2.0)
    )
    assert TopAnyConfig.budgeted(3.5).budget == BudgetConfig(target_k=3.5)


def test_token_takes_every_expert_whose_score_passes_its_threshold():
    routing = route()
    assert routing.mask.tolist() == [[True, True, False], [False, False, False], [False, False, False]]
    assert routing.weights[0].tolist() == [0.5, 0.5, 0.0]
    assert routing.unrouted.tolist() == [False, True, True]


def test_score_equal_to_the_threshold_does_not_pass():
    assert route(threshold=(0.0, 0.0, 0.0)).mask[2].tolist() == [False, False, False]


@pytest.mark.parametrize("how", [{"training": False}, {"training_fallback": "top_1"}], ids=["evaluation", "fallback"])
def test_token_without_an_open_gate_takes_the_best_live_expert(how):
    routing = route(**how)
    # Token 1 scores (-1, 0) against (0, 0.7): σ(0) − σ(0.7) is −0.17, σ(−1) − σ(0) is −0.23. Token 2 scores (0, 0).
    assert routing.mask[1:].tolist() == [[False, True, False], [True, False, False]]
    assert routing.weights[1:].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert routing.unrouted.tolist() == [False, True, True]  # before the fallback


def test_fallback_by_score_does_not_ask_for_thresholds():
    # Token 1 scores (-1, 0) against (-0.9, 0.9): σ(−1) − σ(−0.9) is −0.02, σ(0) − σ(0.9) is −0.21.
    by_margin = route(threshold=(-0.9, 0.9, -2.0), training=False)
    by_score = route(threshold=(-0.9, 0.9, -2.0), training=False, fallback_by="score")
    assert by_margin.mask[1].tolist() == [True, False, False]
    assert by_score.mask[1].tolist() == [False, True, False]
    assert by_score.unrouted[1]


def test_softmax_weights_over_the_chosen_experts():
    weights = route(weighting="softmax", temperature=2.0).weights
    first = 1 / (1 + torch.tensor(2.0 * (0.8 - 0.6)).exp().item())
    torch.testing.assert_close(weights[0], torch.tensor([first, 1 - first, 0.0]))
    assert not weights[1:].any()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_padding_takes_nobody_and_is_not_unrouted(training):
    routing = route(training=training, training_fallback="top_1", real=torch.tensor([False, True, False]))
    assert routing.mask.any(1).tolist() == [False, True, False]
    assert routing.unrouted.tolist() == [False, True, False]
    assert not routing.weights[[0, 2]].any()


@pytest.mark.parametrize(
    ("straight_through", "reached"), [("all_live", [True, True, False]), ("active_only", [True, False, False])]
)
def test_which_thresholds_the_price_reaches(straight_through, reached):
    router = build_router(TopAnyConfig(straight_through=straight_through, price_weight=1.0), 3, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
        router.threshold.copy_(torch.tensor([0.5, 0.9, -2.0]))
    router(TOKENS[:1], ACTIVE, None).aux_losses["price"].backward()
    # −σ'(G): raising the threshold lowers the price, and only where the gradient goes.
    slope = torch.sigmoid(router.threshold.detach()) * (1 - torch.sigmoid(router.threshold.detach()))
    torch.testing.assert_close(router.threshold.grad, torch.where(torch.tensor(reached), -slope, 0.0))


@pytest.mark.parametrize("straight_through", ["all_live", "active_only"])
@pytest.mark.parametrize("weighting", ["average", "softmax"])
def test_output_reaches_the_thresholds_of_open_gates_only(weighting, straight_through):
    router = build_router(TopAnyConfig(weighting=weighting, straight_through=straight_through), 4, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4)[:3])
        router.threshold.copy_(torch.tensor([0.3, 0.7, 0.9]))
    token, live = torch.tensor([[0.5, 0.8, 0.3, 0.1]]), torch.ones(3, dtype=torch.bool)  # about its cosines
    routing = router(token, live, None)
    assert routing.mask.tolist() == [[True, True, False]]
    (routing.weights[0] * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert (router.threshold.grad != 0).tolist() == [True, True, False]


def test_softmax_weight_of_a_single_open_gate_has_no_gradient():
    # It is 1 whatever the margin: with nothing to be compared with, a gate neither opens nor closes.
    router = build_router(TopAnyConfig(weighting="softmax"), 3, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
        router.threshold.copy_(torch.tensor([0.5, 0.9, -2.0]))
    router(TOKENS[:1], ACTIVE, None).weights[0, 0].backward()
    assert not router.threshold.grad.any() and not router.weight.grad.any()


def test_prices():
    routing = route(efficiency_weight=1.0, price_weight=1.0)
    assert routing.aux_losses["price"].item() == pytest.approx(2 / 3)  # two open gates, three tokens
    assert routing.aux_losses["efficiency"].item() == pytest.approx(2 / 6)  # of two live experts each
    padded = route(price_weight=1.0, real=torch.tensor([True, True, False]))
    assert padded.aux_losses["price"].item() == pytest.approx(1.0)


def test_losses_of_weight_zero_are_not_computed():
    assert set(route().aux_losses) == {"diversity", "simplicity"}
    assert route(diversity_weight=0.0, simplicity_weight=0.0).aux_losses == {}


def test_k_max_keeps_the_greatest_margins():
    # Token 0 scores (0.6, 0.8) against (0, 0.7): the second expert's score is the greater one, the first's margin.
    routing = route(k_max=1, price_weight=1.0)
    assert routing.mask.tolist() == [[True, False, False], [False, False, False], [False, False, False]]
    assert routing.weights[0].tolist() == [1.0, 0.0, 0.0]
    assert routing.unrouted.tolist() == [False, True, True]
    assert routing.aux_losses["price"].item() == pytest.approx(1 / 3)
    assert torch.equal(route(k_max=2).mask, route().mask) and torch.equal(route(k_max=7).mask, route().mask)


@pytest.mark.parametrize(
    ("straight_through", "reached"), [("all_live", [True, True, False]), ("active_only", [True, False, False])]
)
def test_a_gate_closed_by_k_max_has_the_gradient_of_a_closed_gate(straight_through, reached):
    config = TopAnyConfig(straight_through=straight_through, price_weight=1.0, k_max=1)
    router = build_router(config, 3, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
        router.threshold.copy_(torch.tensor([0.0, 0.7, -2.0]))
    routing = router(TOKENS[:1], ACTIVE, None)
    routing.weights[0].square().sum().backward(retain_graph=True)
    assert (router.threshold.grad != 0).tolist() == [True, False, False], "the output reaches open gates only"
    router.threshold.grad = None
    routing.aux_losses["price"].backward()
    assert (router.threshold.grad != 0).tolist() == reached


D, SLOTS = 64, 16
BUDGET = BudgetConfig(target_k=2.0)


def many_tokens(num_tokens=2000, seed=0, lead=0.0):
    """Random directions, drawn towards a common one by `lead` deviations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, D, generator=generator) + lead * torch.linspace(2, -1, D)


def live(num_live):
    return torch.arange(SLOTS) < num_live


def wide_router(**options):
    """Orthonormal rows, as a layer starts with."""
    router = build_router(TopAnyConfig(**options), D, SLOTS)
    with torch.no_grad():
        router.weight.copy_(torch.eye(SLOTS, D))
    return router


def mean_k(router, hidden, active):
    return router(hidden, active, None).mask.double().sum(1).mean().item()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("num_live", [4, 9, 16])
@pytest.mark.parametrize("target_k", [1.5, 2.0, 4.0])
def test_a_budget_starts_on_its_target_whatever_the_number_of_live_experts(target_k, num_live, training):
    router = wide_router(budget=BudgetConfig(target_k=target_k)).train(training)
    routing = router(many_tokens(), live(num_live), None)
    open_gates = routing.mask.sum(1) - (0 if training else routing.unrouted.long())  # less the fallback's
    assert open_gates.double().mean().item() == pytest.approx(target_k, rel=0.05)


def test_warm_up_starts_with_the_papers_thresholds():
    warming = wide_router(budget=BudgetConfig(target_k=2.0, warmup_steps=10))
    assert torch.equal(warming(many_tokens(), live(8), None).mask, wide_router()(many_tokens(), live(8), None).mask)


def test_warm_up_asks_for_no_more_than_k_max():
    router = wide_router(k_max=3, budget=BudgetConfig(target_k=2.0, warmup_steps=2))
    assert router.budget.target(live(16).sum()).item() == 3.0  # not 8, half of the live experts


def test_a_positive_control_closes_gates():
    router, found = wide_router(budget=BUDGET), []
    for control in (-2.0, -0.05, 0.0, 0.05, 2.0):
        router.budget.control.fill_(control)
        found.append(mean_k(router, many_tokens(), live(16)))
    assert found == sorted(found, reverse=True) and (found[0], found[-1]) == (16.0, 0.0)


def test_thresholds_are_centred_over_the_live_experts_under_a_budget():
    router, hidden = wide_router(budget=BUDGET, price_weight=1.0), many_tokens()
    with torch.no_grad():
        router.threshold.copy_(0.05 * torch.randn(SLOTS, generator=torch.Generator().manual_seed(1)))
    before = router(hidden, live(9), None)
    with torch.no_grad():
        router.threshold += torch.where(live(9), 0.25, 50.0)
    after = router(hidden, live(9), None)
    assert torch.equal(before.mask, after.mask)
    torch.testing.assert_close(before.weights, after.weights)
    after.aux_losses["price"].backward()
    grad = router.threshold.grad
    assert grad[:9].abs().min() > 0 and not grad[9:].any()
    assert grad.sum().item() == pytest.approx(0, abs=1e-6), "no step of the parameters moves them together"


def test_a_bias_moves_load_and_neither_k_nor_weights():
    router, hidden = wide_router(weighting="softmax", temperature=4.0, bias_update_speed=0.1), many_tokens()
    plain = router(hidden, live(9), None)
    router.selection_bias.copy_(torch.where(live(9), 0.3, 50.0))
    assert torch.equal(router(hidden, live(9), None).mask, plain.mask), "a bias that all have is none"
    router.selection_bias[:9] = torch.tensor([0.1] + [-0.0125] * 8)  # of mean 0
    biased = router(hidden, live(9), None)
    assert biased.mask[:, 0].sum() > 1.3 * plain.mask[:, 0].sum()
    assert (biased.mask[:, 1:9].sum(0) < plain.mask[:, 1:9].sum(0)).all()
    strength = torch.where(biased.mask, (4.0 * torch.cosine_similarity(hidden[:, None], router.weight, dim=2)).exp(), 0)
    torch.testing.assert_close(biased.weights, strength / strength.sum(1, keepdim=True).clamp_min(1e-12))


def train_controllers(router, hidden_of, active, num_steps):
    """Optimiser steps that change nothing but the controllers; the mean k of each."""
    found = []
    for step in range(num_steps):
        hidden = hidden_of(step)
        records = RoutingRecords.of(router(hidden, active, None), hidden, None)
        update_routers({"a": router}, {"a": records}, {"a": active})
        found.append(records.mean_k)
    return torch.tensor(found)


@pytest.mark.parametrize("lead", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    "options", [{}, {"training_fallback": "top_1"}, {"k_max": 3, "training_fallback": "top_1"}], ids=str
)
def test_a_budget_holds_mean_k_through_growth_and_pruning(options, lead):
    router = wide_router(temperature=10.0, budget=BUDGET, **options)
    for num_live in (4, 16, 6):
        found = train_controllers(router, lambda step: many_tokens(256, step, lead), live(num_live), 100)
        assert found[-40:].mean().item() == pytest.approx(2.0, rel=0.02), num_live
        assert found[-40:].std().item() < 0.2, "the loop swings"
        assert found[:10].max().item() < 4.0 or lead == 2.0, "a step of growth must not cost a burst of experts"


def test_a_target_above_the_live_experts_opens_all_and_comes_back():
    router = wide_router(budget=BudgetConfig(target_k=6.0))
    few = train_controllers(router, lambda step: many_tokens(256, step), live(3), 200)
    assert few[-1].item() == pytest.approx(3.0, rel=0.02)
    assert router.budget.control.abs() < 0.5, "the sum of errors ran away"
    assert train_controllers(router, lambda step: many_tokens(256, step), live(16), 30)[-10:].mean().item() == (
        pytest.approx(6.0, rel=0.05)
    )


def test_bias_and_budget_hold_load_and_k_together():
    router = wide_router(temperature=10.0, budget=BUDGET, training_fallback="top_1", bias_update_speed=0.005)
    lead = torch.cat([torch.linspace(0.7, -0.7, 8), torch.zeros(D - 8)])  # all tokens prefer the first experts
    hidden, loads = many_tokens(4000, 999) + lead, []
    for num_steps in (0, 200):
        k = train_controllers(router, lambda step: many_tokens(256, step) + lead, live(8), num_steps)
        loads.append(router(hidden, live(8), None).mask[:, :8].double().sum(0))
    assert loads[0].max() > 1.5 * loads[0].mean() and loads[1].max() < 1.15 * loads[1].mean()
    assert k[-50:].mean().item() == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_max": 0}, "router.k_max is 0 but must be at least 1."),
        ({"bias_update_speed": -1.0}, "router.bias_update_speed is -1.0 but must not be negative."),
        (
            {"budget": BudgetConfig(target_k=0.0)},
            "router.budget.target_k is 0.0 but must be a finite number above 0.",
        ),
        (
            {"budget": BudgetConfig(target_k=1.0), "training_fallback": "top_1"},
            "router.budget.target_k is 1.0 but must be a finite number above 1.",
        ),
        (
            {"budget": BudgetConfig(target_k=3.0), "k_max": 2},
            "router.budget.target_k is 3.0 but no token may take more than router.k_max (2). Lower the one or raise "
            "the other.",
        ),
        ({"score": "dot"}, "router.score is 'dot'. Use cosine or softmax."),
        ({"load_balance_gradient": "k"}, "router.load_balance_gradient is 'k'. Use gates or shares."),
        ({"weighting": "max"}, "router.weighting is 'max'. Use average or softmax."),
        ({"straight_through": "all"}, "router.straight_through is 'all'. Use active_only or all_live."),
        ({"training_fallback": "top_2"}, "router.training_fallback is 'top_2'. Use none or top_1."),
        ({"fallback_by": "gate"}, "router.fallback_by is 'gate'. Use margin or score."),
        ({"temperature": 0.0}, "router.temperature is 0.0 but must be above 0."),
        ({"temperature": float("nan")}, "router.temperature is nan but must be above 0."),
        *(
            ({f"{name}_weight": -0.5}, f"router.{name}_weight is -0.5 but must not be negative.")
            for name in ("diversity", "simplicity", "load_balance", "efficiency", "price")
        ),
    ],
)
def test_values_that_cannot_work(options, message):
    assert TopAnyConfig(**options).faults() == [message]
    with pytest.raises(ConfigError) as caught:
        build_router(TopAnyConfig(**options), 3, 3)
    assert str(caught.value) == message
