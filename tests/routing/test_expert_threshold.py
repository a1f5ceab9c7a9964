"""Expert-threshold routing: the formulas as a loop in float64, thresholds step by step, mean k in training; what every
router promises is in tests/routing/test_contract.py."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import (
    ExpertThresholdConfig,
    Router,
    RoutingRecords,
    build_router,
    router_config,
    update_routers,
)
from dynmoe_ds.routing.score_histogram import kth_greatest, score_histogram
from dynmoe_ds.routing.splitting import SplitExpert
from tests.helpers.reference import assert_near
from tests.helpers.short_training import train_shortly

D, SLOTS, T = 6, 7, 40
ACTIVE = torch.tensor([True, False, True, True, True, False, True])
LIVE = ACTIVE.nonzero().flatten().tolist()


def make(config: ExpertThresholdConfig, *, started: bool = True, dtype: torch.dtype = torch.float64) -> Router:
    """A router with random rows and, once started, random thresholds."""
    router = build_router(config, D, SLOTS).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(SLOTS, D, generator=generator, dtype=torch.float64))
        if started:
            router.threshold.copy_(torch.where(ACTIVE, 1 + torch.randn(SLOTS, generator=generator), 0.0))
            router.num_updates.fill_(5)
            router.num_live.fill_(len(LIVE))
    return router


def tokens(num_tokens: int = T, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype)


def step(router: Router, *parts: Tensor, active: Tensor = ACTIVE) -> RoutingRecords:
    """One optimiser step over tokens that come in parts; its records."""
    seen = [RoutingRecords.of(router(part, active, None), part, None) for part in parts]
    total = seen[0]
    for record in seen[1:]:
        total = total + record
    update_routers({"a": router}, {"a": total}, {"a": active})
    return total


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("started", [True, False], ids=["started", "first step"])
@pytest.mark.parametrize("options", [{}, {"training_fallback": "top_1"}, {"k_max": 2, "target_k": 1.9}], ids=str)
def test_router_equals_the_formulas(options, started, padded, training):
    config = ExpertThresholdConfig(**options)
    router = make(config, started=started).train(training)
    real = torch.arange(T) % 4 != 0 if padded else None
    x, rows = tokens().requires_grad_(), router.weight.detach().clone().requires_grad_()
    routing = router(x, ACTIVE, real)

    z = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - config.target_k / len(LIVE), dtype=torch.float64)).item()
    weights: dict[tuple[int, int], Tensor] = {}
    unrouted, num_passed = [], 0
    for t in range(T):
        if real is not None and not real[t]:
            continue
        score = {e: rows[e] @ x[t] for e in LIVE}
        threshold = {e: router.threshold[e].item() for e in LIVE}
        if not started:
            for e in LIVE:
                lengths = x[t].square().sum().sqrt() * rows[e].square().sum().sqrt()
                threshold[e] = lengths.item() * z / math.sqrt(D - 1 + z**2)
        margin = {e: score[e].item() - threshold[e] for e in LIVE}
        best = sorted(LIVE, key=lambda e: -margin[e])
        chosen = [e for e in best if margin[e] > 0]
        num_passed += len(chosen)
        if not chosen:
            unrouted.append(t)
            if not training or config.training_fallback == "top_1":
                chosen = best[:1]
        weights |= {(t, e): 1 / (1 + torch.exp(-score[e])) for e in chosen[: config.k_max]}

    assert routing.mask.nonzero().tolist() == [list(pair) for pair in sorted(weights)]
    assert routing.unrouted.nonzero().flatten().tolist() == unrouted and 0 < len(unrouted) < T
    assert config.k_max is None or routing.mask.sum(1).max() == config.k_max
    assert routing.aux_losses == {} and routing.statistics["passed"].item() == num_passed
    want = torch.zeros(T, SLOTS, dtype=torch.float64)
    want = want.index_put(tuple(torch.tensor(list(weights)).T), torch.stack(list(weights.values())))
    assert_near(routing.weights, want, what="weights")
    factors = torch.randn(T, SLOTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = torch.autograd.grad((routing.weights * factors).sum(), (x, router.weight))
    by_hand = torch.autograd.grad((want * factors).sum(), (x, rows))
    assert_near(got[0], by_hand[0], what="gradient of the tokens")
    assert_near(got[1], by_hand[1], what="gradient of the rows")


def test_default_is_the_paper():
    assert asdict(ExpertThresholdConfig()) == {
        "target_k": 2.0,
        "decay": 0.99,
        "training_fallback": "none",
        "k_max": None,
    }
    best = router_config("expert_threshold_recommended")
    assert best == ExpertThresholdConfig(decay=0.9, training_fallback="top_1")
    assert best.has_equal_loads and best.may_leave_unrouted and best.aux_loss_weights() == {}


def test_before_the_first_step_random_tokens_take_the_target_whatever_their_length():
    layer = dm.MoELayer(
        hidden_size=64, ffn_hidden_size=4, num_experts=16, num_slots=20, router="expert_threshold", seed=0
    )
    for length in (0.01, 1.0, 100.0):
        x = length * torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
        assert layer.router(x, layer.active, None).mask.sum(1).double().mean().item() == pytest.approx(2.0, rel=0.05)


def test_thresholds_are_the_corrected_moving_average_of_the_global_quantiles():
    """Exactly, given the histograms; these are exact to a bin's width (tests/routing/test_score_histogram.py)."""
    config = ExpertThresholdConfig(target_k=1.5, decay=0.8)
    router = make(config, started=False)
    raw = torch.zeros(SLOTS, dtype=torch.float64)
    for number in range(1, 6):
        x = tokens(200, seed=number)
        step(router, x[:31], x[31:32], x[32:])  # micro steps or ranks, of different sizes
        scores = (x @ router.weight.T).detach()
        share = 1.5 / len(LIVE)
        wanted = kth_greatest(score_histogram(scores, ACTIVE.expand_as(scores)), torch.full((SLOTS,), share * 200))
        exact = scores.sort(0, descending=True).values[int(share * 200) - 1]
        assert ((wanted - exact).abs()[ACTIVE] <= 0.034 * exact.abs()[ACTIVE] + 0.02).all()
        raw = 0.8 * raw + 0.2 * wanted
        corrected = raw / (1 - 0.8**number)
        torch.testing.assert_close(router.threshold[ACTIVE], corrected[ACTIVE], rtol=1e-12, atol=0)
        assert not router.threshold[~ACTIVE].any()
        assert (int(router.num_updates), int(router.num_live)) == (number, len(LIVE))
    assert router.added_k.item() == 0.0


def test_what_a_fallback_adds_is_a_moving_average_that_starts_anew_with_the_thresholds():
    config = ExpertThresholdConfig(target_k=1.5, decay=0.8, training_fallback="top_1")
    router, more = make(config, started=False).train(), ACTIVE.clone()
    more[1] = True
    for active, num_steps in ((ACTIVE, 3), (more, 2)):
        raw = 0.0
        for number in range(1, num_steps + 1):
            record = step(router, tokens(200, seed=10 * num_steps + number), active=active)
            added = (int(record.num_assignments) - float(record.statistics["passed"])) / 200
            raw = 0.8 * raw + 0.2 * added
            assert router.added_k.item() == pytest.approx(raw / (1 - 0.8**number), rel=1e-12) and added > 0.1


def test_every_expert_then_takes_its_share():
    router, x = make(ExpertThresholdConfig(target_k=1.5), started=False), tokens(4000)
    step(router, x)
    load = router(x, ACTIVE, None).mask.sum(0)[ACTIVE].double() / 4000
    assert load.tolist() == pytest.approx([0.3] * 5, rel=0.02)


@pytest.mark.parametrize(
    "options", [{"training_fallback": "top_1", "target_k": 1.5}, {"k_max": 2, "target_k": 1.5}], ids=str
)
def test_mean_k_counts_what_a_fallback_adds_and_k_max_takes_away(options):
    router, x = make(ExpertThresholdConfig(decay=0.0, **options), started=False), tokens(4000)
    router.train()
    record = step(router, x)
    added = (int(record.num_assignments) - float(record.statistics["passed"])) / 4000
    assert router.added_k.item() == pytest.approx(added) and abs(added) > 0.05
    for _ in range(20):
        record = step(router, x)
    assert record.mean_k == pytest.approx(1.5, rel=0.02)
    assert float(record.statistics["passed"]) / 4000 == pytest.approx(1.5 - router.added_k.item(), rel=0.02)


def test_averages_start_anew_when_experts_come_or_go():
    router, x = make(ExpertThresholdConfig(decay=0.99), started=False), tokens(4000)
    for _ in range(3):
        step(router, x)
    more = ACTIVE.clone()
    more[1] = True
    step(router, x, active=more)
    assert int(router.num_updates) == 1
    load = router(x, more, None).mask.sum(0)[more].double() / 4000
    assert load.tolist() == pytest.approx([2 / 6] * 6, rel=0.02), "at once, in spite of a decay of 0.99"
    step(router, x, active=more)
    assert int(router.num_updates) == 2


def test_padding_is_in_no_histogram():
    router, x = make(ExpertThresholdConfig()), tokens(50)
    real = torch.arange(50) < 30
    padded, alone = router(x, ACTIVE, real), router(x[:30], ACTIVE, None)
    assert torch.equal(padded.statistics["scores"], alone.statistics["scores"])
    assert padded.statistics["scores"].sum().item() == 30 * len(LIVE)
    assert not padded.statistics["scores"][~ACTIVE].any()


def test_more_experts_per_token_than_there_are_experts_are_all_of_them():
    router, x = make(ExpertThresholdConfig(target_k=9.0), started=False), tokens(100)
    step(router, x)
    assert router(x, ACTIVE, None).mask.sum(1).double().mean().item() > 4.9


def test_state_comes_back_with_a_state_dict():
    router, again = (make(router_config("expert_threshold_recommended"), started=False) for _ in range(2))
    for number in range(4):
        step(router, tokens(seed=number))
    again.load_state_dict(router.state_dict())
    for number in range(3):
        for key, value in router.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        for one in (router, again):
            step(one, tokens(seed=10 + number))


def test_observables():
    router = make(ExpertThresholdConfig())
    assert router.observables(ACTIVE)["threshold"].item() == pytest.approx(router.threshold[ACTIVE].mean().item())


def test_mean_k_and_loads_are_on_target_in_training():
    run = train_shortly("expert_threshold_recommended", steps=240)
    assert run.mean_k[192:].mean().item() == pytest.approx(2.0, rel=0.05)
    assert run.losses[0] > 5.0 and run.losses[-20:].mean() < 2.9


def split(router: Router, hidden: Tensor, chose_parent: Tensor) -> dict[str, Tensor]:
    """What the router makes of a split of slot 2 into 2 and 1, whose rows part."""
    values = {"weight": router.weight.detach().clone(), "threshold": router.threshold.clone()}
    values["threshold"][1] = values["threshold"][2]
    push = torch.tensor([0.0, 1, 0, -1, 0, 1], dtype=torch.float64)
    values["weight"][1], values["weight"][2] = values["weight"][2] - push, values["weight"][2] + push
    given = {name: value.clone() for name, value in values.items()}
    active = ACTIVE.clone()
    active[1] = True
    changed = router.split(
        values, SplitExpert(parent=2, child=1, active=active, hidden=hidden, chose_parent=chose_parent)
    )
    assert all(torch.equal(value, given[name]) for name, value in values.items()), "its input is not its to change"
    with torch.no_grad():
        for name, value in (values | changed).items():
            router.state_dict()[name].copy_(value)
    return changed


def test_halves_share_the_load_of_their_parent_until_the_next_step():
    router, hidden = make(ExpertThresholdConfig()), tokens(400)
    before = router(hidden, ACTIVE, None).mask
    split(router, hidden, before[:, 2])
    active = ACTIVE.clone()
    active[1] = True
    after, load = router(hidden, active, None).mask, int(before[:, 2].sum())
    assert load > 20 and after[:, [1, 2]].sum(0).tolist() == [load // 2, load // 2]
    others = [0, 3, 4, 5, 6]
    assert torch.equal(after[:, others], before[:, others])


@pytest.mark.parametrize("num_chosen", [0, 1])
def test_without_tokens_of_the_parent_its_threshold_is_copied(num_chosen):
    router = make(ExpertThresholdConfig())
    assert split(router, tokens(num_chosen), torch.ones(num_chosen, dtype=torch.bool)) == {}
    assert router.threshold[1] == router.threshold[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_k": 0.0}, "router.target_k is 0.0 but must be a finite number above 0."),
        ({"target_k": math.nan}, "router.target_k is nan but must be a finite number above 0."),
        (
            {"target_k": 1.0, "training_fallback": "top_1"},
            "router.target_k is 1.0 but must be a finite number above 1.",
        ),
        ({"decay": 1.0}, "router.decay is 1.0 but must be at least 0 and below 1."),
        ({"decay": -0.1}, "router.decay is -0.1 but must be at least 0 and below 1."),
        ({"training_fallback": "top_2"}, "router.training_fallback is 'top_2'. Use none or top_1."),
        ({"k_max": 0}, "router.k_max is 0 but must be at least 1."),
        (
            {"k_max": 1},
            "router.target_k is 2.0 but no token may take more than router.k_max (1). "
            "Lower the one or raise the other.",
        ),
    ],
)
def test_values_that_cannot_work(options, message):
    assert ExpertThresholdConfig(**options).faults() == [message]
    with pytest.raises(ConfigError) as caught:
        build_router(ExpertThresholdConfig(**options), D, SLOTS)
    assert str(caught.value) == message
