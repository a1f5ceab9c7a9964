"""Top-k: worked examples, and the formulas as a loop in float64; what every router promises is in
tests/routing/test_contract.py."""

from itertools import product

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import TopKConfig, build_router, router_config
from tests.helpers.softmax_reference import ACTIVE, check_routing, random_router, tokens

ALL_LIVE = torch.ones(3, dtype=torch.bool)


def by_hand(probabilities, **options):
    """A router that gives the one token [1] these probabilities, over live slots without a free one."""
    router = build_router(TopKConfig(**options), 1, len(probabilities))
    with torch.no_grad():
        router.weight.copy_(torch.tensor(probabilities).log()[:, None])
    return router


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("nulls", [(0, "zero"), (2, "zero"), (3, "identity")], ids=["", "zero", "identity"])
@pytest.mark.parametrize(("k", "renormalize"), [*product((1, 2, 4), (True, False)), (20, True)])
def test_router_equals_the_formulas(k, renormalize, nulls, padded):
    num_null, kind = nulls
    config = TopKConfig(
        k=k, renormalize=renormalize, z_loss_weight=0.3, load_balance_weight=0.7, num_null_experts=num_null,
        null_expert=kind,
    )  # fmt: skip
    real = torch.arange(20) % 4 != 0 if padded else None
    check_routing(random_router(config), tokens(), ACTIVE, real)
    check_routing(random_router(config, torch.float32), tokens(dtype=torch.float32), ACTIVE, real)


@pytest.mark.parametrize("nulls", [0, 2])
def test_a_bias_changes_the_choice_and_not_the_weights(nulls):
    config = TopKConfig(bias_update_speed=0.1, num_null_experts=nulls, renormalize=False)
    router = random_router(config)
    biased = check_routing(router, tokens(), ACTIVE, None)
    router.selection_bias.zero_()
    assert not torch.equal(router(tokens(), ACTIVE, None).mask, biased.mask)


def test_the_k_most_probable_by_their_share():
    routing = by_hand([0.2, 0.5, 0.3])(torch.ones(1, 1), ALL_LIVE, None)
    assert routing.mask.tolist() == [[False, True, True]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.0, 0.625, 0.375]]))
    raw = by_hand([0.2, 0.5, 0.3], renormalize=False)(torch.ones(1, 1), ALL_LIVE, None)
    torch.testing.assert_close(raw.weights, torch.tensor([[0.0, 0.5, 0.3]]))


def test_with_k_1_the_weight_stays_the_probability_and_teaches_the_router():
    router = by_hand([0.2, 0.5, 0.3], k=1)
    routing = router(torch.ones(1, 1), ALL_LIVE, None)
    torch.testing.assert_close(routing.weights, torch.tensor([[0.0, 0.5, 0.0]]))
    routing.weights.sum().backward()
    assert router.weight.grad.all()


def test_with_few_live_experts_all_are_taken():
    live = torch.tensor([True, False, True])
    routing = by_hand([0.2, 0.5, 0.3], k=3)(torch.ones(1, 1), live, None)
    assert torch.equal(routing.mask, live[None])
    torch.testing.assert_close(routing.weights, torch.tensor([[0.4, 0.0, 0.6]]))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_balance_is_1_for_even_loads_and_more_for_uneven_ones(k):
    router = build_router(TopKConfig(k=k), 4, 4)
    live = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    # Token t prefers expert t, then t + 1, and so on: each expert is chosen equally often.
    even = torch.stack([torch.tensor([3.0, 2.0, 1.0, 0.0]).roll(t) for t in range(4)])
    assert router(even, live, None).aux_losses["load_balance"].item() == pytest.approx(1.0)
    if k < 4:
        assert router(even[[0, 0, 0, 1]], live, None).aux_losses["load_balance"].item() > 1.1


def test_null_experts_share_one_frequency_in_the_load_balance():
    # One token, two experts and two null experts, of which it chooses one: f = (1/2, 0) and 1/4 for either null expert.
    router = build_router(TopKConfig(num_null_experts=2), 1, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.4], [0.1]]).log())
        router.null_weight.copy_(torch.tensor([[0.3], [0.2]]).log())
    routing = router(torch.ones(1, 1), torch.ones(2, dtype=torch.bool), None)
    assert routing.mask.tolist() == [[True, False]]
    expected = 4 * (0.5 * 0.4 + 0 * 0.1 + 0.25 * 0.3 + 0.25 * 0.2)
    assert routing.aux_losses["load_balance"].item() == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "weights", "passed"), [("zero", [1.0, 0.0], None), ("identity", [0.4, 0.0], [0.6])])
def test_what_null_experts_give(kind, weights, passed):
    router = build_router(TopKConfig(num_null_experts=1, null_expert=kind), 1, 2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.36], [0.1]]).log())
        router.null_weight.copy_(torch.tensor([[0.54]]).log())
    routing = router(torch.ones(1, 1), torch.ones(2, dtype=torch.bool), None)
    torch.testing.assert_close(routing.weights, torch.tensor([weights]))
    if passed is None:
        assert routing.passed_through is None
    else:
        torch.testing.assert_close(routing.passed_through, torch.tensor(passed))


@pytest.mark.parametrize("kind", ["zero", "identity"])
def test_a_token_with_null_experts_alone_passes_the_layer_and_is_not_unrouted(kind):
    config = TopKConfig(k=2, num_null_experts=2, null_expert=kind)
    layer = dm.MoELayer(hidden_size=4, ffn_hidden_size=4, num_experts=2, num_slots=3, router=config, seed=0)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).abs().requires_grad_()
    with torch.no_grad():
        layer.router.null_weight.fill_(100.0)
    with dm.StepLedger() as ledger:
        y = layer(x)
    assert torch.equal(y, x if kind == "identity" else torch.zeros_like(x))
    (record,) = ledger.records().values()
    assert (int(record.num_tokens), int(record.num_assignments), int(record.num_unrouted)) == (5, 0, 0)
    with torch.autograd.set_detect_anomaly(True):  # raises for a NaN anywhere on the way
        (y.sum() + ledger.aux_loss()).backward()
    assert layer.router.shared_parameters == ("null_weight",)
    assert layer.router.slot_parameters().keys() == {"weight"}


def test_pruning_leaves_enough_experts():
    assert TopKConfig(k=3).min_experts == 3
    assert TopKConfig(k=3, num_null_experts=2).min_experts == TopKConfig(k=3, num_null_experts=5).min_experts == 1


def test_preset():
    assert router_config("top_k") == TopKConfig() == dm.TopKConfig(k=2, renormalize=True, load_balance_weight=0.01)
    assert TopKConfig().aux_loss_weights() == {"load_balance": 0.01, "z_loss": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "router.k is 0 but must be at least 1."),
        ({"bias_update_speed": -0.1}, "router.bias_update_speed is -0.1 but must not be negative."),
        ({"num_null_experts": -1}, "router.num_null_experts is -1 but must not be negative."),
        ({"null_expert": "copy"}, "router.null_expert is 'copy'. Use zero or identity."),
        ({"load_balance_weight": -1.0}, "router.load_balance_weight is -1.0 but must not be negative."),
        ({"z_loss_weight": float("nan")}, "router.z_loss_weight is nan but must not be negative."),
    ],
)
def test_values_that_cannot_work(options, message):
    assert TopKConfig(**options).faults() == [message]
    with pytest.raises(ConfigError) as caught:
        build_router(TopKConfig(**options), 3, 3)
    assert str(caught.value) == message
