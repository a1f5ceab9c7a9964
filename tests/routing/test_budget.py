"""The PI controller by itself: arithmetic against a loop in plain Python, warm-up, limits, state and faults."""

import random
from math import inf, nan

import pytest
import torch
from torch import nn

from dynmoe_ds.routing.budget import Budget, BudgetConfig


def make(target_k=2.0, kp=0.25, ki=0.125, limit=inf, k_max=None, **options):
    """Gains whose products with small numbers are exact."""
    config = BudgetConfig(target_k=target_k, **options)
    return Budget(config, proportional_gain=kp, integral_gain=ki, limit=limit, k_max=k_max)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def update(budget, mean_k, num_live):
    budget.update(scalar(mean_k), scalar(num_live))
    return budget.control.item()


def test_worked_example():
    budget = make(target_k=2.0, kp=0.5, ki=0.25)
    assert budget.control.item() == 0.0
    assert update(budget, 4.0, 8) == 0.5 * 0.25 + 0.25 * 0.25  # two experts of eight too many
    assert update(budget, 3.0, 8) == 0.5 * 0.125 + 0.25 * (0.25 + 0.125)
    assert update(budget, 2.0, 8) == 0.25 * (0.25 + 0.125)  # on the target, the sum stays
    assert update(budget, 0.0, 8) == 0.5 * -0.25 + 0.25 * 0.125
    assert budget.num_updates.item() == 4


@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 37}, {"warmup_steps": 50, "warmup_k": 3.3}], ids=str)
@pytest.mark.parametrize(("limit", "k_max"), [(inf, None), (0.02, None), (inf, 3)])
def test_equals_a_loop_bit_for_bit(warmup, limit, k_max):
    generator = random.Random(0)
    kp, ki, target_k = 0.217, 0.053, 2.7
    budget = make(target_k, kp, ki, limit, k_max, **warmup)
    total, swings = 0.0, set()
    for step in range(120):
        num_live = generator.randint(1, 9)
        mean_k = generator.random() * num_live
        target = target_k
        if warmup and step < warmup["warmup_steps"]:
            start = warmup.get("warmup_k", num_live / 2)
            target = start + (target_k - start) * (step / warmup["warmup_steps"])
        error = (mean_k - min(target, num_live, k_max or inf)) / num_live
        total = min(max(total + error, -limit / ki), limit / ki)
        assert update(budget, mean_k, num_live) == kp * error + ki * total, step
        swings.add(total > 0)
    assert swings == {True, False}, "errors of one sign only"


def test_warm_up_starts_at_half_of_the_live_experts():
    budget, targets = make(target_k=2.0, warmup_steps=4), []
    for _ in range(6):
        targets.append(budget.target(torch.tensor(8)).item())
        update(budget, targets[-1], 8)
    assert targets == [4.0, 3.5, 3.0, 2.5, 2.0, 2.0]
    assert budget.control.item() == 0.0, "k followed the target"


def test_warm_up_starts_where_it_is_told_and_may_rise():
    budget = make(target_k=4.0, warmup_steps=2, warmup_k=1.0)
    assert budget.target(torch.tensor(8)).item() == 1.0
    update(budget, 1.0, 8)
    assert budget.target(torch.tensor(8)).item() == 2.5


@pytest.mark.parametrize(("num_live", "k_max", "target"), [(8, None, 6.0), (5, None, 5.0), (8, 3, 3.0), (2, 3, 2.0)])
def test_target_is_never_more_than_a_token_can_take(num_live, k_max, target):
    assert make(target_k=6.0, k_max=k_max).target(torch.tensor(num_live)).item() == target
    warming = make(target_k=1.0, k_max=k_max, warmup_steps=9, warmup_k=6.0)
    assert warming.target(torch.tensor(num_live)).item() == target


def test_all_experts_of_a_small_pool_are_on_target():
    budget = make(target_k=6.0)
    assert update(budget, 3.0, 3) == 0.0
    assert update(budget, 3.0, 6) < 0.0, "three more experts are live: there is room for more"


def test_sum_of_errors_stops_at_the_limit_and_comes_back_at_once():
    limited, unlimited = make(kp=0.0, ki=0.25, limit=1.0), make(kp=0.0, ki=0.25)
    for budget in (limited, unlimited):
        for _ in range(100):
            update(budget, 6.0, 8)  # an error of a half that nothing helps against
    assert limited.control.item() == 1.0 and unlimited.control.item() == 12.5
    assert update(limited, 0.0, 8) == 1.0 - 0.25 * 0.25
    for _ in range(100):
        update(limited, 0.0, 8)
    assert limited.control.item() == -1.0


def test_gains_of_the_configuration_go_before_those_of_the_router():
    assert (make().proportional_gain, make().integral_gain) == (0.25, 0.125)
    own = make(proportional_gain=0.0, integral_gain=2.0)
    assert (own.proportional_gain, own.integral_gain) == (0.0, 2.0)
    assert update(own, 3.0, 4) == 0.5


def test_state_dict_holds_everything():
    budget = make(warmup_steps=30)
    for step in range(17):
        update(budget, 1 + step / 7, 9)
    again = make(warmup_steps=30)
    again.load_state_dict(budget.state_dict())
    assert set(budget.state_dict()) == {"control", "error_sum", "num_updates"}
    for step in range(20):
        assert again.control.item() == budget.control.item()
        assert again.target(torch.tensor(9)).item() == budget.target(torch.tensor(9)).item()
        assert update(again, 3 - step / 9, 9) == update(budget, 3 - step / 9, 9)


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.float, lambda m: m.to(torch.bfloat16)])
def test_precision_survives_a_cast_of_the_model(cast):
    budget = make(kp=0.0, ki=1e-4)
    model = cast(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"budget": budget})))
    assert model[0].weight.dtype != torch.float64
    assert model[1]["budget"] is budget
    assert (budget.control.dtype, budget.num_updates.dtype) == (torch.float64, torch.int64)
    for _ in range(1000):
        update(budget, 3.0, 4)
    assert budget.control.item() == pytest.approx(0.025, rel=1e-12)


def test_state_follows_the_model_to_a_device():
    budget = make().to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in budget.buffers()} == {"meta"}
    assert budget.control.dtype == torch.float64


BOUND = "but no token may take more than router.k_max (2). Lower the one or raise the other."


@pytest.mark.parametrize(
    ("options", "bounds", "messages"),
    [
        ({}, {}, []),
        ({"target_k": 2, "scope": "model", "warmup_steps": 3, "warmup_k": 1.5}, {"k_max": 2, "k_min": 1}, []),
        ({"target_k": 0.0}, {}, ["router.budget.target_k is 0.0 but must be a finite number above 0."]),
        ({"target_k": nan}, {}, ["router.budget.target_k is nan but must be a finite number above 0."]),
        ({"target_k": inf}, {}, ["router.budget.target_k is inf but must be a finite number above 0."]),
        ({"target_k": 1.0}, {"k_min": 1}, ["router.budget.target_k is 1.0 but must be a finite number above 1."]),
        ({"target_k": 2.5}, {"k_max": 2}, [f"router.budget.target_k is 2.5 {BOUND}"]),
        ({"warmup_steps": 9, "warmup_k": 3.0}, {"k_max": 2}, [f"router.budget.warmup_k is 3.0 {BOUND}"]),
        (
            {"warmup_steps": 9, "warmup_k": 1.0},
            {"k_min": 1},
            ["router.budget.warmup_k is 1.0 but must be a finite number above 1."],
        ),
        ({"scope": "all"}, {}, ["router.budget.scope is 'all'. Use layer or model."]),
        ({"warmup_steps": -1}, {}, ["router.budget.warmup_steps is -1 but must not be negative."]),
        (
            {"warmup_k": 3.0},
            {},
            [
                "router.budget.warmup_k is 3.0 but router.budget.warmup_steps is 0. Set warmup_steps, or leave "
                "warmup_k out."
            ],
        ),
        (
            {"proportional_gain": -0.1},
            {},
            ["router.budget.proportional_gain is -0.1 but must be a finite number that is not negative."],
        ),
        (
            {"integral_gain": inf},
            {},
            ["router.budget.integral_gain is inf but must be a finite number that is not negative."],
        ),
        (
            {"integral_gain": 0.0},
            {},
            ["router.budget.integral_gain is 0, which leaves a constant error. Use a value above 0."],
        ),
    ],
)
def test_values_that_cannot_work(options, bounds, messages):
    assert BudgetConfig(**{"target_k": 2.0, **options}).faults(**bounds) == messages
