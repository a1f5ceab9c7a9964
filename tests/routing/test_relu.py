"""ReLU routing: the formulas as a loop in float64, λ step by step, mean k in training; what every router promises is in
tests/routing/test_contract.py."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.adaptation.splitting import split_rows
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import (
    BudgetConfig,
    ReluConfig,
    Router,
    RoutingRecords,
    build_router,
    router_config,
    update_routers,
)
from dynmoe_ds.routing.splitting import SplitExpert
from tests.helpers.reference import assert_near
from tests.helpers.short_training import train_shortly

D, SLOTS = 6, 7
ACTIVE = torch.tensor([True, False, True, True, True, False, True])
LIVE = ACTIVE.nonzero().flatten().tolist()
BUDGET = BudgetConfig(target_k=1.5)


def make(config: ReluConfig, dtype: torch.dtype = torch.float64) -> Router:
    router = build_router(config, D, SLOTS).to(dtype)
    with torch.no_grad():
        rows = torch.randn(SLOTS, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        router.weight.copy_(rows + 0.4)  # against the mean of the tokens, as sparse rows are
    return router


def tokens(num_tokens: int = 60, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype) - 0.6


def records(num_tokens: int, num_assignments: int) -> RoutingRecords:
    zeros = RoutingRecords.zeros(SLOTS, D, {}, torch.device("cpu"))
    return replace(zeros, num_tokens=torch.tensor(num_tokens), num_assignments=torch.tensor(num_assignments))


def expected(
    x: Tensor, rows: Tensor, config: ReluConfig, real: Tensor | None, training: bool
) -> tuple[dict[tuple[int, int], Tensor], dict[str, Tensor], list[int]]:
    """Weights by token and slot, losses by name, and the tokens without an open expert."""
    target = config.target_k if config.budget is None else config.budget.target_k
    weights: dict[tuple[int, int], Tensor] = {}
    opened: list[tuple[int, Tensor]] = []
    depth, unrouted = torch.zeros((), dtype=torch.float64), []
    real_tokens = [t for t in range(len(x)) if real is None or real[t]]
    for t in real_tokens:
        score = {e: config.score_scale * (rows[e] @ x[t]) for e in LIVE}
        chosen = sorted((e for e in LIVE if score[e] > 0), key=lambda e: -score[e].item())
        opened += [(e, score[e]) for e in chosen]
        depth = depth - sum(score[e] for e in LIVE if e not in chosen)
        weights |= {(t, e): score[e] for e in chosen[: config.k_max]}
        if not chosen:
            unrouted.append(t)
            if not training:
                weights[t, max(LIVE, key=lambda e: score[e].item())] = torch.tensor(
                    0.1 * config.score_scale, dtype=torch.float64
                )
    num_tokens, num_live = len(real_tokens), len(LIVE)
    load = {e: sum(1 for slot, _ in opened if slot == e) for e in LIVE}
    factor = {e: num_live / (target * num_tokens) * load[e] if config.load_balanced else 1.0 for e in LIVE}
    losses = {"l1": sum(factor[e] * strength for e, strength in opened) / num_tokens}
    if config.budget is not None:
        losses["opening"] = 4 * target / max(num_live - target, 1) * depth / num_tokens
    return weights, losses, unrouted


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"load_balanced": False},
        {"k_max": 2},
        {"score_scale": 1.7, "target_k": 3.5},
        {"budget": BUDGET},
        {"budget": BudgetConfig(target_k=4.5)},
    ],
    ids=str,
)
def test_router_equals_the_formulas(options, padded, training):
    config = ReluConfig(**options)
    router, real = make(config).train(training), torch.arange(60) % 4 != 0 if padded else None
    x, rows = tokens().requires_grad_(), router.weight.detach().clone().requires_grad_()
    routing = router(x, ACTIVE, real)
    weights, losses, unrouted = expected(x, rows, config, real, training)

    assert routing.mask.nonzero().tolist() == [list(pair) for pair in sorted(weights)]
    assert routing.unrouted.nonzero().flatten().tolist() == unrouted
    assert 0 < len(unrouted) < 30 and (config.k_max is None or routing.mask.sum(1).max() == config.k_max)
    want = torch.zeros(60, SLOTS, dtype=torch.float64)
    want = want.index_put(
        tuple(torch.tensor(sorted(weights)).T), torch.stack([weights[key] for key in sorted(weights)])
    )
    assert_near(routing.weights, want, what="weights")
    assert routing.aux_losses.keys() == losses.keys()
    for name, value in losses.items():
        assert_near(routing.aux_losses[name], value, what=name)

    factors = torch.randn(60, SLOTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = (x, router.weight), (x, rows)
    got, by_hand = (
        torch.autograd.grad((output * factors).sum() + sum(3.0 * value for value in terms.values()), of)
        for output, terms, of in zip((routing.weights, want), (routing.aux_losses, losses), leaves, strict=True)
    )
    assert_near(got[0], by_hand[0], what="gradient of the tokens")
    assert_near(got[1], by_hand[1], what="gradient of the rows")


def test_a_token_of_zeros_opens_no_expert():
    routing = make(ReluConfig())(torch.zeros(3, D, dtype=torch.float64), ACTIVE, None)
    assert routing.unrouted.all() and not routing.mask.any()


def test_default_is_the_paper():
    assert asdict(ReluConfig()) == {
        "target_k": 2.0,
        "score_scale": 0.28,
        "lambda_init": 1e-8,
        "lambda_factor": 1.2,
        "load_balanced": True,
        "k_max": None,
        "budget": None,
    }
    budget = router_config("relu_budget")
    assert budget == ReluConfig(budget=BudgetConfig(target_k=2.0, warmup_steps=100))
    assert ReluConfig.budgeted(3.0).wanted_k == ReluConfig(target_k=3.0).wanted_k == 3.0


def test_weights_start_with_a_sensible_sum():
    layer = dm.MoELayer(hidden_size=64, ffn_hidden_size=4, num_experts=16, num_slots=20, router="relu", seed=0)
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))  # as a norm leaves it: length √D
    weights = layer.router(x, layer.active, None).weights
    assert weights.sum(1).mean().item() == pytest.approx(1.8, abs=0.1)
    assert weights.square().sum(1).sqrt().mean().item() == pytest.approx(0.8, abs=0.05)
    assert (weights > 0).sum(1).double().mean().item() == pytest.approx(8, abs=0.3)


def test_lambda_follows_the_rule_exactly():
    router = make(ReluConfig(target_k=2.5, lambda_init=1e-3, lambda_factor=1.5))
    expected_lambda = 1e-3
    for num_assignments, sign in ((30, 1), (26, 1), (25, 0), (24, -1), (40, 1), (0, -1), (1, -1), (2, -1)):
        update_routers({"a": router}, {"a": records(10, num_assignments)}, {"a": ACTIVE})
        expected_lambda *= 1.5**sign
        assert router.l1_coefficient.item() == pytest.approx(expected_lambda, rel=1e-15)
        assert router.aux_loss_weights() == {"l1": torch.tensor(expected_lambda)}
        assert router.observables(ACTIVE) == {"lambda": router.l1_coefficient}


def test_lambda_stops_at_a_thousandth_of_its_start_and_comes_back():
    router = make(ReluConfig(lambda_factor=10.0))
    for _ in range(20):
        update_routers({"a": router}, {"a": records(10, 0)}, {"a": ACTIVE})
    assert router.l1_coefficient.item() == pytest.approx(1e-11)
    update_routers({"a": router}, {"a": records(10, 90)}, {"a": ACTIVE})
    assert router.l1_coefficient.item() == pytest.approx(1e-10)


def test_lambda_is_the_weight_of_the_loss():
    layer = dm.MoELayer(hidden_size=D, ffn_hidden_size=4, num_experts=4, num_slots=5, router="relu", seed=0)
    layer.router.l1_coefficient.fill_(0.37)
    x = tokens(dtype=torch.float32)
    with dm.StepLedger() as ledger:
        layer(x)
    l1 = layer.router(x, layer.active, None).aux_losses["l1"]
    torch.testing.assert_close(ledger.aux_loss(), 0.37 * l1)


@pytest.mark.parametrize("gains", [{}, {"proportional_gain": 6.0, "integral_gain": 0.5}], ids=str)
def test_a_budget_moves_lambda_both_ways(gains):
    config = ReluConfig(budget=BudgetConfig(target_k=2.0, **gains))
    kp, ki = gains.get("proportional_gain", 12.0), gains.get("integral_gain", 1.2)
    router, error_sum = make(config), 0.0
    assert "l1_coefficient" not in router.state_dict()
    for num_assignments in (22, 20, 21, 17, 18, 18, 19, 60, 1):  # of 10 tokens
        update_routers({"a": router}, {"a": records(10, num_assignments)}, {"a": ACTIVE})
        error = (num_assignments / 10 - 2) / 2
        error_sum += min(max(error, -0.12 / ki), 0.12 / ki)
        control = min(max(kp * error, -2.5), 2.5) + ki * error_sum
        value = 0.002 * math.sinh(control)
        assert router.budget.control.item() == pytest.approx(control, rel=1e-12)
        assert router.observables(ACTIVE)["lambda"].item() == pytest.approx(value, rel=1e-12)
        weights = {name: weight.item() for name, weight in router.aux_loss_weights().items()}
        assert weights == {"l1": pytest.approx(max(value, 0)), "opening": pytest.approx(max(-value, 0))}


def test_the_sum_of_errors_of_a_budget_is_bounded():
    router = make(ReluConfig(budget=BUDGET))
    for num_assignments, sign in ((50, 1), (0, -1)):
        for _ in range(200):
            update_routers({"a": router}, {"a": records(10, num_assignments)}, {"a": ACTIVE})
        assert router.budget.control.item() == pytest.approx(sign * (6.0 + 2.5))


def test_a_warm_up_does_not_start_above_what_a_token_can_take():
    router = make(ReluConfig(k_max=2, budget=BudgetConfig(target_k=1.5, warmup_steps=100)))
    assert router.observables(ACTIVE)["budget_target"] == 2.0, "half of the live experts are 2.5"


def test_opening_reaches_an_expert_that_is_closed_to_everybody():
    router = make(ReluConfig(budget=BUDGET))
    with torch.no_grad():
        router.weight[LIVE[0]] = 0.5  # against the mean of the tokens
    routing = router(tokens() - 5, ACTIVE, None)
    assert not routing.mask[:, LIVE[0]].any()
    (gradient,) = torch.autograd.grad(routing.aux_losses["opening"], router.weight, retain_graph=True)
    assert gradient[LIVE[0]].any()
    (gradient,) = torch.autograd.grad(routing.aux_losses["l1"], router.weight)
    assert not gradient[LIVE[0]].any()


@pytest.mark.parametrize("name", ["relu", "relu_budget"])
def test_state_comes_back_with_a_state_dict(name):
    router, again = make(router_config(name)), make(router_config(name))
    for num_assignments in (30, 10, 40, 50):
        update_routers({"a": router}, {"a": records(10, num_assignments)}, {"a": ACTIVE})
    again.load_state_dict(router.state_dict())
    for _ in range(3):
        assert again.observables(ACTIVE) == router.observables(ACTIVE)
        for one in (router, again):
            update_routers({"a": one}, {"a": records(10, 25)}, {"a": ACTIVE})


# A budget of 8 experts comes down in 100 steps; one of 4 has no warm-up.
@pytest.mark.parametrize(
    ("config", "num_experts"), [(ReluConfig.budgeted(), 8), (ReluConfig(budget=BudgetConfig(target_k=2.0)), 4)]
)
def test_a_budget_holds_mean_k_in_training(config, num_experts):
    run = train_shortly(config, steps=300, num_experts=num_experts)
    assert run.mean_k[240:].mean().item() == pytest.approx(2.0, rel=0.05)
    assert run.losses[0] > 5.0 and run.losses[-20:].mean() < 2.9


def test_the_papers_rule_makes_training_sparse():
    run = train_shortly("relu", steps=220)
    assert run.mean_k[0] > 3.0 > 2.0 > run.mean_k[-20:].mean() > 0.1
    steps = torch.sign(run.mean_k.double() - 2.0).sum()  # far from the floor
    assert run.layer.router.l1_coefficient.item() == pytest.approx(1e-8 * 1.2 ** steps.item(), rel=1e-9)


def parted(row: Tensor) -> Tensor:
    """The rows [2, D] of the two halves of an expert with gate row `row`, as a split gives them to the router."""
    step = torch.tensor([1.0, -1, 0, 0, 1, 0], dtype=torch.float64)
    step -= (step @ row) / (row @ row) * row
    return split_rows(row, step / torch.linalg.vector_norm(step), 0.4)


def halves(router: Router, hidden: Tensor, chose_parent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows before a split of slot 2 into 2 and 1, and what the router makes of it."""
    before = router.weight.detach().clone()
    values = {"weight": before.clone()}
    values["weight"][[2, 1]] = parted(before[2])
    given = values["weight"].clone()
    active = ACTIVE.clone()
    active[1] = True
    split = SplitExpert(parent=2, child=1, active=active, hidden=hidden, chose_parent=chose_parent)
    changed = router.split(values, split)
    assert torch.equal(values["weight"], given), "its input is not its to change"
    return before, changed


def test_halves_share_the_load_and_the_weight_of_their_parent():
    router, hidden = make(ReluConfig()), tokens(400)
    mask, old = router(hidden, ACTIVE, None)[:2]
    before, changed = halves(router, hidden, mask[:, 2])
    with torch.no_grad():
        router.weight.copy_(changed["weight"])
    active = ACTIVE.clone()
    active[1] = True
    after, new = router(hidden, active, None)[:2]
    load = int(mask[:, 2].sum())
    assert 20 < load < 200
    # About half each: a shift along the parent's tokens opens the halves to a few tokens that point away from them.
    assert all(0.4 * load < half < 0.7 * load for half in after[:, [1, 2]].sum(0).tolist())
    assert new[:, [1, 2]].sum().item() == pytest.approx(old[:, 2].sum().item(), rel=1e-6)
    others = [e for e in range(SLOTS) if e not in (1, 2)]
    assert torch.equal(router.weight.detach()[others], before[others])


def test_a_split_never_opens_halves_to_more_tokens_or_closes_them_to_all():
    """Of tokens that point almost everywhere alike, where a shift along the parent's may open as many as it closes."""
    router, num_narrowed = make(ReluConfig()), 0
    for seed in range(60):
        hidden = torch.randn(100, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.1
        before, changed = halves(router, hidden, router(hidden, ACTIVE, None).mask[:, 2])
        given, got = ((hidden @ rows.T > 0).sum() for rows in (parted(before[2]), changed["weight"][[2, 1]]))
        assert 0 < got <= given, seed
        num_narrowed += int(got < given)
    assert 0 < num_narrowed < 60


@pytest.mark.parametrize("num_chosen", [0, 1])
def test_without_tokens_of_the_parent_the_halves_get_half_the_length(num_chosen):
    router = make(ReluConfig())
    before, changed = halves(router, tokens(num_chosen), torch.ones(num_chosen, dtype=torch.bool))
    both = changed["weight"][1] + changed["weight"][2]
    torch.testing.assert_close(both, before[2] / (1 + 0.4**2) ** 0.5)


BOUND = "but no token may take more than router.k_max (2). Lower the one or raise the other."
BOTH = "but router.budget takes its place. Leave one of the two out."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_k": 0.0}, "router.target_k is 0.0 but must be a finite number above 0."),
        ({"score_scale": -1.0}, "router.score_scale is -1.0 but must be a finite number above 0."),
        ({"lambda_init": math.inf}, "router.lambda_init is inf but must be a finite number above 0."),
        ({"lambda_factor": 1.0}, "router.lambda_factor is 1.0 but must be a finite number above 1."),
        ({"k_max": 0, "budget": BudgetConfig(target_k=0.0)}, "router.k_max is 0 but must be at least 1."),
        (
            {"k_max": 2, "target_k": 2.5},
            f"router.target_k is 2.5 {BOUND}",
        ),
        (
            {"k_max": 2, "budget": BudgetConfig(target_k=2.5)},
            f"router.budget.target_k is 2.5 {BOUND}",
        ),
        ({"target_k": 3.0, "budget": BUDGET}, f"router.target_k is 3.0 {BOTH}"),
        ({"lambda_init": 1e-4, "budget": BUDGET}, f"router.lambda_init is 0.0001 {BOTH}"),
        ({"lambda_factor": 1.1, "budget": BUDGET}, f"router.lambda_factor is 1.1 {BOTH}"),
    ],
)
def test_values_that_cannot_work(options, message):
    assert ReluConfig(**options).faults()[0] == message
    with pytest.raises(ConfigError) as caught:
        build_router(ReluConfig(**options), D, SLOTS)
    assert message in str(caught.value)


def test_a_budget_wins_over_the_default_target_and_may_repeat_it():
    assert ReluConfig(budget=BUDGET).faults() == [] and ReluConfig(budget=BUDGET).wanted_k == 1.5
    assert ReluConfig(target_k=1.5, budget=BUDGET).faults() == []
