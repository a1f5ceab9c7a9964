"""λ and moving thresholds under the engine: from the tokens of all ranks and micro steps, once per optimiser step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dynmoe_ds as dm
from tests.helpers.models import TinyModel, batch, deepspeed_config
from tests.helpers.spawn import run_ranks

STEPS, ACCUMULATE, TOKENS, EXPERTS, SLOTS = 5, 2, 48, 4, 6
# Without the load-balanced L1 loss, which is one of a rank's tokens: all layouts train alike.
ROUTERS: dict[str, Any] = {
    "relu": dm.ReluConfig(target_k=1.6, lambda_init=1e-3, lambda_factor=1.5, load_balanced=False),
    "relu, budget": dm.ReluConfig(
        load_balanced=False, budget=dm.BudgetConfig(target_k=1.5, warmup_steps=4, warmup_k=2.5)
    ),
    "relu, one budget": dm.ReluConfig(load_balanced=False, budget=dm.BudgetConfig(target_k=1.5, scope="model")),
    "threshold": dm.ExpertThresholdConfig(target_k=1.5, decay=0.8),
    "threshold, all options": dm.ExpertThresholdConfig(target_k=1.5, decay=0.8, k_max=2, training_fallback="top_1"),
}
LAYERS = ("moe.0", "moe.1")
# Ranks in an expert-parallel group, and how many of the 48 tokens of a micro step each rank has.
LAYOUTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "one rank": (1, (48,)),
    "replicas": (1, (24, 24)),
    "expert parallel": (2, (24, 24)),
    "uneven": (1, (40, 8)),
}
ON_TWO = ("replicas", "expert parallel", "uneven")


def _train(rank: int, world_size: int, layouts: tuple[str, ...]) -> dict[Any, Any]:
    return {(name, layout): _train_one(rank, name, layout) for name in ROUTERS for layout in layouts}


def _train_one(rank: int, name: str, layout: str) -> dict[str, Any]:
    """Per optimiser step: the controllers after it, and by layer what this rank's router said and saw in it."""
    ep_size, shares = LAYOUTS[layout]
    model = TinyModel(ep_size, num_experts=EXPERTS, num_slots=SLOTS, router=ROUTERS[name])
    engine = dm.initialize(model, deepspeed_config(2, accumulate=ACCUMULATE))
    layers = {n: m for n, m in engine.module.named_modules() if isinstance(m, dm.MoELayer)}
    steps = []
    for step in range(STEPS):
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
        hooks = [layer.router.register_forward_hook(_noting(seen[n])) for n, layer in layers.items()]
        between = []
        for micro in range(ACCUMULATE):
            x, y = (t.split(shares)[rank] for t in batch(ACCUMULATE * step + micro, TOKENS))
            engine.backward(engine(x, y))
            between.append(_state(layers))
            engine.step()
        for hook in hooks:
            hook.remove()
        engine.eval()
        with torch.no_grad():
            engine(*batch(99, 16))
        engine.train()
        state = _state(layers)
        parts = {layer: [torch.cat(part) for part in zip(*calls, strict=True)] for layer, calls in seen.items()}
        steps.append({"state": state, "during": between, "scores": parts})
    new = TinyModel(ep_size, num_experts=EXPERTS, num_slots=SLOTS, router=ROUTERS[name])
    new.load_state_dict(engine.module.state_dict())
    restored = _state({n: m for n, m in new.named_modules() if isinstance(m, dm.MoELayer)})
    return {"steps": steps, "restored": restored}


def _noting(seen: list[tuple[Tensor, Tensor]]) -> Any:
    """A hook that keeps `w_e · x` [T, K] and the choices [T, S] of a router's calls."""

    def note(router: Any, args: tuple[Any, ...], routing: dm.Routing) -> None:
        hidden, active = args[:2]
        seen.append(((hidden @ router.weight.T).detach()[:, active], routing.mask.clone()))

    return note


def _state(layers: dict[str, dm.MoELayer]) -> dict[str, Tensor]:
    return {f"{n}.{key}": b.clone() for n, layer in layers.items() for key, b in layer.router.named_buffers()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[Any, Any]]:
    return run_ranks(_train, 2, ON_TWO, timeout_s=120)


@pytest.fixture(scope="module")
def one_rank() -> dict[Any, Any]:
    return run_ranks(_train, 1, ("one rank",), timeout_s=120)[0]


def _steps(two_ranks: list[dict[Any, Any]], name: str, layout: str) -> list[tuple[Any, Any]]:
    return list(zip(*(rank[name, layout]["steps"] for rank in two_ranks), strict=True))


def _mean_k(ranks: tuple[Any, Any], layer: str) -> float:
    """Experts per token of a step, over all tokens of both ranks."""
    mask = torch.cat([step["scores"][layer][1] for step in ranks])
    assert len(mask) == ACCUMULATE * TOKENS
    return mask.sum().item() / len(mask)


@pytest.mark.parametrize("layout", ON_TWO)
@pytest.mark.parametrize("name", ROUTERS)
def test_controllers_are_equal_on_all_ranks_though_their_tokens_are_not(two_ranks: Any, name: str, layout: str) -> None:
    means: tuple[list[float], list[float]] = ([], [])
    for first, second in _steps(two_ranks, name, layout):
        for found, step in zip(means, (first, second), strict=True):
            found += [step["scores"][layer][1].sum(1).double().mean().item() for layer in LAYERS]
        assert first["state"] and first["state"].keys() == second["state"].keys()
        for key, value in first["state"].items():
            assert torch.equal(value, second["state"][key]), key
    differing = [first != second for first, second in zip(*means, strict=True)]
    assert sum(differing) > 0.7 * len(differing), "ranks with the same tokens show nothing"


@pytest.mark.parametrize("layout", ON_TWO)
@pytest.mark.parametrize("name", ROUTERS)
def test_controllers_move_after_the_last_micro_step_alone(two_ranks: Any, name: str, layout: str) -> None:
    before = None
    for first, _ in _steps(two_ranks, name, layout):
        assert len(first["during"]) == ACCUMULATE
        for during in first["during"]:
            before = during if before is None else before
            assert all(torch.equal(value, before[key]) for key, value in during.items())
        moved = [key for key, value in first["state"].items() if not torch.equal(value, first["during"][0][key])]
        assert all(any(key.startswith(layer) for key in moved) for layer in LAYERS)
        before = first["state"]


@pytest.mark.parametrize("layout", ["replicas", "expert parallel"])
@pytest.mark.parametrize("name", ROUTERS)
def test_two_ranks_control_like_one(two_ranks: Any, one_rank: Any, name: str, layout: str) -> None:
    expected = one_rank[name, "one rank"]["steps"]
    for number, (actual, _) in enumerate(_steps(two_ranks, name, layout)):
        for key, value in actual["state"].items():
            torch.testing.assert_close(
                value, expected[number]["state"][key], rtol=1e-4, atol=1e-5, msg=f"step {number} {key}"
            )


@pytest.mark.parametrize("layout", ON_TWO)
def test_lambda_goes_by_the_mean_of_all_tokens_once_a_step(two_ranks: Any, layout: str) -> None:
    found = set()
    for layer in LAYERS:
        value = 1e-3
        for ranks in _steps(two_ranks, "relu", layout):
            is_above = _mean_k(ranks, layer) > 1.6
            value *= 1.5 if is_above else 1 / 1.5
            assert float(ranks[0]["state"][f"{layer}.l1_coefficient"]) == pytest.approx(value, rel=1e-12)
            found.add(is_above)
    assert found == {True, False}


@pytest.mark.parametrize("layout", ON_TWO)
@pytest.mark.parametrize("name", ["relu, budget", "relu, one budget"])
def test_a_budget_takes_in_every_step_once(two_ranks: Any, name: str, layout: str) -> None:
    error_sum = dict.fromkeys(LAYERS, 0.0)
    for number, ranks in enumerate(_steps(two_ranks, name, layout)):
        mean_k = {layer: _mean_k(ranks, layer) for layer in LAYERS}
        assert mean_k["moe.0"] != mean_k["moe.1"]
        if name == "relu, one budget":
            mean_k = dict.fromkeys(LAYERS, sum(mean_k.values()) / 2)
        target = 1.5 if name == "relu, one budget" else max(2.5 - number / 4, 1.5)
        for layer in LAYERS:
            error = mean_k[layer] / target - 1
            error_sum[layer] += min(max(error, -0.1), 0.1)
            control = min(max(12 * error, -2.5), 2.5) + 1.2 * error_sum[layer]
            state = ranks[0]["state"]
            assert int(state[f"{layer}.budget.num_updates"]) == number + 1
            assert float(state[f"{layer}.budget.error_sum"]) == pytest.approx(error_sum[layer], abs=1e-12)
            assert float(state[f"{layer}.budget.control"]) == pytest.approx(control, abs=1e-12)


@pytest.mark.parametrize("layout", ON_TWO)
def test_thresholds_are_the_averages_of_what_the_share_of_all_tokens_passes(two_ranks: Any, layout: str) -> None:
    share = 1.5 / EXPERTS
    for layer in LAYERS:
        average, slack = torch.zeros(EXPERTS, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
        for number, ranks in enumerate(_steps(two_ranks, "threshold", layout), 1):
            parts = [step["scores"][layer][0].double() for step in ranks]
            ordered = torch.cat(parts).sort(0, descending=True).values
            place = int(share * len(ordered))
            assert len(ordered) == ACCUMULATE * TOKENS and place == share * len(ordered)
            # Between the last score that passes and the next, to a bin's width (tests/routing/test_score_histogram.py).
            wanted = ordered[place - 1 : place + 1].mean(0)
            width = (ordered[place - 1] - ordered[place]) / 2 + 0.034 * ordered[place - 1].abs() + 4e-5
            average, slack = 0.8 * average + 0.2 * wanted, 0.8 * slack + 0.2 * width
            state, correction = ranks[0]["state"], 1 - 0.8**number
            threshold = state[f"{layer}.threshold"]
            assert int(state[f"{layer}.num_updates"]) == number
            off = (threshold[threshold != 0] - average / correction).abs()
            assert (off <= slack / correction).all(), (number, layer, off, slack / correction)
