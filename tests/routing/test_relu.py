"""ReLU routing: the formulas of ReMoE as a loop in float64, the rule for λ, and a run that reaches its target."""

import math

import pytest
import torch

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import ReluConfig, RoutingRecords, build_router, router_config, update_routers
from dynmoe_ds.routing.relu import BUDGET_LAMBDA, FALLBACK_SHARE, LAMBDA_FLOOR, OPENING_FACTOR

ACTIVE = torch.tensor([True, True, False, True, True])
LIVE = [0, 1, 3, 4]


def router_and_tokens(config):
    generator = torch.Generator().manual_seed(0)
    router = build_router(config, 6, 5).double()
    with torch.no_grad():
        router.weight.copy_(torch.randn(5, 6, generator=generator))
    return router, torch.randn(12, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("load_balanced", [True, False])
@pytest.mark.parametrize("k_max", [None, 1, 2])
def test_router_equals_the_formulas(load_balanced, k_max):
    config = ReluConfig(target_k=0.75, score_scale=0.4, load_balanced=load_balanced, k_max=k_max)
    router, hidden = router_and_tokens(config)
    real = torch.arange(12) % 4 != 3
    routing = router.train()(hidden, ACTIVE, real)
    weight = router.weight.detach()
    scores = [[0.4 * float(hidden[t] @ weight[e]) for e in range(5)] for t in range(12)]
    loads = {e: sum(scores[t][e] > 0 for t in range(12) if real[t]) for e in LIVE}
    l1 = 0.0
    for t in range(12):
        is_open = {e for e in LIVE if scores[t][e] > 0 and real[t]}
        assert bool(routing.unrouted[t]) == (not is_open and bool(real[t]))
        kept = set(sorted(is_open, key=lambda e: -scores[t][e])[:k_max])
        for e in range(5):
            assert bool(routing.mask[t, e]) == (e in kept)
            assert float(routing.weights[t, e]) == pytest.approx(scores[t][e] if e in kept else 0.0, abs=1e-12)
        for e in is_open:
            factor = len(LIVE) / (0.75 * 9) * loads[e] if load_balanced else 1.0
            l1 += factor * scores[t][e] / 9
    assert float(routing.aux_losses["l1"]) == pytest.approx(l1, rel=1e-12)


def test_gradients_are_those_of_the_weights_and_of_the_loss_with_constant_loads():
    router, hidden = router_and_tokens(ReluConfig(target_k=2.0, score_scale=1.0))
    routing = router.train()(hidden, ACTIVE, None)
    pull = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ((routing.weights * pull).sum() + 0.5 * routing.aux_losses["l1"]).backward()
    is_open = (hidden @ router.weight.T > 0) & ACTIVE
    factor = len(LIVE) / (2.0 * 12) * is_open.sum(0)
    coefficient = torch.where(is_open, pull + 0.5 * factor / 12, 0.0)
    torch.testing.assert_close(router.weight.grad, coefficient.T.to(router.weight.grad) @ hidden.to(router.weight.grad))


def test_evaluation_serves_a_token_without_an_open_expert_with_a_small_weight():
    router, _ = router_and_tokens(ReluConfig())
    with torch.no_grad():
        router.weight.copy_(-torch.ones(5, 6))
        router.weight[3] *= 0.5
    hidden = torch.ones(2, 6, dtype=torch.float64)
    trained = router.train()(hidden, ACTIVE, None)
    assert not trained.mask.any() and trained.unrouted.all()
    routing = router.eval()(hidden, ACTIVE, None)
    assert routing.mask.nonzero().tolist() == [[0, 3], [1, 3]] and routing.unrouted.all()
    assert routing.weights[0, 3].item() == pytest.approx(FALLBACK_SHARE * 0.28)


def records(mean_k, num_tokens=100):
    record = RoutingRecords.zeros(5, 6, {}, torch.device("cpu"))
    return RoutingRecords(
        tokens_per_slot=record.tokens_per_slot,
        num_tokens=torch.tensor(num_tokens),
        num_assignments=torch.tensor(round(mean_k * num_tokens)),
        num_unrouted=record.num_unrouted,
        unrouted_sum=record.unrouted_sum,
    )


def test_lambda_follows_the_rule():
    router = build_router(ReluConfig(target_k=2.0), 6, 5)
    want = 1e-8
    for mean_k in (4.0, 3.0, 1.0, 2.0, 2.5):
        want *= 1.2 ** ((mean_k > 2) - (mean_k < 2))
        update_routers({"a": router}, {"a": records(mean_k)}, {"a": ACTIVE})
        assert float(router.aux_loss_weights()["l1"]) == pytest.approx(want, rel=1e-6)
    for _ in range(100):
        update_routers({"a": router}, {"a": records(0.5)}, {"a": ACTIVE})
    assert float(router.l1_coefficient) == pytest.approx(1e-8 * LAMBDA_FLOOR), "it must not sink out of reach"


def test_with_a_budget_lambda_is_the_sinh_of_the_control_and_opens_when_negative():
    router = build_router(ReluConfig.budgeted(2.0), 6, 5)
    for control in (1.5, -2.0):
        router.budget.control.fill_(control)
        weights, size = router.aux_loss_weights(), BUDGET_LAMBDA * math.sinh(abs(control))
        assert float(weights["l1"]) == pytest.approx(size if control > 0 else 0.0, rel=1e-6)
        assert float(weights["opening"]) == pytest.approx(size if control < 0 else 0.0, rel=1e-6)


def test_the_opening_loss_reaches_closed_experts_alone():
    router, hidden = router_and_tokens(ReluConfig.budgeted(2.0))
    routing = router.train()(hidden, ACTIVE, None)
    scores = 0.28 * hidden @ router.weight.T
    want = torch.where(ACTIVE, torch.relu(-scores), 0.0).sum() / 12 * OPENING_FACTOR * 2.0 / (4 - 2.0)
    torch.testing.assert_close(routing.aux_losses["opening"], want.detach(), check_dtype=False)


def test_the_state_is_in_the_state_dict():
    router, other = (build_router(ReluConfig(), 6, 5) for _ in range(2))
    for _ in range(3):
        update_routers({"a": router}, {"a": records(4.0)}, {"a": ACTIVE})
    other.load_state_dict(router.state_dict())
    assert float(other.l1_coefficient) == float(router.l1_coefficient) == pytest.approx(1e-8 * 1.2**3)
    assert router.bfloat16().l1_coefficient.dtype == torch.float64


def test_faults():
    with pytest.raises(ConfigError) as caught:
        router_config(ReluConfig(target_k=0.0, score_scale=-1.0, lambda_init=0.0, lambda_factor=1.0, k_max=0))
    assert [fault.split()[0] for fault in caught.value.faults[:5]] == [
        f"router.{name}" for name in ("target_k", "score_scale", "lambda_init", "lambda_factor", "k_max")
    ]
    with pytest.raises(ConfigError, match=r"no token may take more than router.k_max \(1\)"):
        router_config(ReluConfig(k_max=1))
    with pytest.raises(ConfigError, match=r"router.lambda_init is 0.5 but router.budget takes its place"):
        router_config(ReluConfig(lambda_init=0.5, budget=dm.BudgetConfig(target_k=2.0)))


def test_training_brings_k_to_its_target():
    """A layer that fits a random function, of tokens with a mean: without one every row is open to half of them."""
    torch.manual_seed(0)
    layer = dm.MoELayer(
        hidden_size=16, ffn_hidden_size=16, num_experts=8, num_slots=8, router=ReluConfig(target_k=3.0), seed=0
    )
    goal = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    found = []
    for _ in range(400):
        x = torch.randn(256, 16) + 0.5
        with dm.StepLedger() as ledger:
            loss = (layer(x) - goal(x).detach()).square().mean()
        (loss + ledger.aux_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        (record,) = ledger.records().values()
        update_routers({"a": layer.router}, {"a": record}, {"a": layer.active})
        found.append(record.mean_k)
    assert abs(sum(found[-80:]) / 80 / 3.0 - 1) < 0.05, found[-80:]
