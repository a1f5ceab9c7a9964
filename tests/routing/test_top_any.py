"""Configuration and worked examples of the router; tests/moe/test_layer.py compares it with the formulas."""

from dataclasses import asdict

import pytest
import torch

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import TopAnyConfig, build_router, router_config

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
        "temperature": 1.0,
        "weighting": "average",
        "straight_through": "all_live",
        "training_fallback": "none",
        "diversity_weight": 0.01,
        "simplicity_weight": 0.01,
        "load_balance_weight": 0.0,
        "load_balance_gradient": "gates",
        "efficiency_weight": 0.0,
        "price_weight": 0.0,
    }


def test_presets():
    code, best = router_config("top_any_authors_code"), router_config("top_any_recommended")
    assert list(code.aux_loss_weights().values()) == [0.01, 0.01, 0.01, 0.01, 0.0]
    assert (code.straight_through, code.training_fallback, code.weighting) == ("active_only", "none", "average")
    assert list(best.aux_loss_weights().values()) == [0.01, 0.01, 0.01, 0.0, 0.01 / 16]
    assert (best.temperature, best.weighting, best.training_fallback) == (10.0, "softmax", "top_1")
    assert (code.load_balance_gradient, best.load_balance_gradient) == ("gates", "shares")


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
    routing.weights[0, :2].square().sum().backward()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_balance_gradient": "k"}, "router.load_balance_gradient is 'k'. Use gates or shares."),
        ({"weighting": "max"}, "router.weighting is 'max'. Use average or softmax."),
        ({"straight_through": "all"}, "router.straight_through is 'all'. Use active_only or all_live."),
        ({"training_fallback": "top_2"}, "router.training_fallback is 'top_2'. Use none or top_1."),
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
