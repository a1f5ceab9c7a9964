"""Top-k and top-p routing a second time: the formulas as a loop over tokens, without any code of the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynmoe_ds.routing import Router, TopKConfig, TopPConfig, build_router
from tests.helpers.reference import assert_near

D, SLOTS = 6, 7
ACTIVE = torch.tensor([True, False, True, True, True, False, True])


def random_router(config: TopKConfig | TopPConfig, dtype: torch.dtype = torch.float64) -> Router:
    """A router with random rows and, if it has one, a random balancing bias."""
    router = build_router(config, D, SLOTS).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if config.bias_update_speed > 0:
            router.get_buffer("selection_bias").copy_(0.3 * torch.randn(SLOTS, generator=generator))
    return router


def tokens(num_tokens: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random tokens [T, D]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedRouting:
    """mask, weights [T, S] and passed_through [T] (zeros for none) in float64; aux_losses by name, of weight 0 too."""

    mask: Tensor
    weights: Tensor
    passed_through: Tensor
    aux_losses: dict[str, Tensor]


def expected_routing(
    router: Router, x: Tensor, parameters: dict[str, Tensor], live: list[int], real: Tensor | None, *, p: float = 0.0
) -> ExpectedRouting:
    """What `router` must give for x [T, D], from `parameters` (its own by name, as float64 leaves).

    live: the live slots. p: what top-p takes, which a budget may have moved from its configuration.
    """
    config: Any = router.config
    num_slots, num_null = len(parameters["weight"]), config.num_null_experts
    nulls = [f"null {i}" for i in range(num_null)]
    members: list[int | str] = [*live, *nulls]
    rows: dict[int | str, Tensor] = {e: parameters["weight"][e] for e in live}
    rows |= {null: parameters["null_weight"][i] for i, null in enumerate(nulls)}
    bias = {e: float(router.get_buffer("selection_bias")[e]) if config.bias_update_speed else 0.0 for e in live}

    weights = torch.zeros(len(x), num_slots, dtype=torch.float64)
    mask, passed = weights.bool(), torch.zeros(len(x), dtype=torch.float64)
    choices, probabilities, squared = [], [], []
    for t, h in enumerate(x):
        if real is not None and not real[t]:
            continue
        strength = {e: torch.exp(rows[e] @ h) for e in members}
        total = sum(strength.values())
        P = {e: strength[e] / total for e in members}
        order = sorted(members, key=lambda e: -(P[e].item() + bias.get(e, 0.0)))
        chosen = _top_k(order, config) if isinstance(config, TopKConfig) else _top_p(order, P, config, p)
        weight = {e: P[e] for e in chosen}
        if config.renormalize and getattr(config, "k", 2) > 1:
            counted = [e for e in chosen if config.null_expert == "identity" or e in live]
            weight = {e: P[e] / sum(P[c] for c in counted) for e in counted}
        for e in chosen:
            if isinstance(e, int):
                mask[t, e] = True
                weights[t, e] = weight[e]
            elif config.null_expert == "identity":
                passed[t] = passed[t] + weight[e]
        choices.append(chosen)
        probabilities.append(P)
        squared.append(torch.log(total) ** 2)

    losses = {"load_balance": _load_balance(choices, probabilities, members, nulls, isinstance(config, TopKConfig))}
    if isinstance(config, TopKConfig):
        losses["z_loss"] = _mean(squared)
    else:
        losses["entropy"] = _mean([-sum(q * torch.log(q) for q in P.values()) for P in probabilities])
    return ExpectedRouting(mask=mask, weights=weights, passed_through=passed, aux_losses=losses)


def _top_k(order: list[int | str], config: TopKConfig) -> list[int | str]:
    return order[: config.k]


def _top_p(order: list[int | str], P: dict[int | str, Tensor], config: TopPConfig, p: float) -> list[int | str]:
    held, prefix = 0.0, []
    for e in order:
        prefix.append(e)
        held += P[e].item()
        if held >= p:
            break
    if config.k_max is None:
        return prefix
    experts = [e for e in prefix if isinstance(e, int)][: config.k_max]
    return [e for e in prefix if e in experts or isinstance(e, str)]


def _load_balance(
    choices: list[list[int | str]],
    probabilities: list[dict[int | str, Tensor]],
    members: list[int | str],
    nulls: list[str],
    per_choice: bool,
) -> Tensor:
    total = sum(len(chosen) for chosen in choices) if per_choice else len(choices)
    f: dict[int | str, float] = {e: sum(e in chosen for chosen in choices) / max(total, 1) for e in members}
    f |= {null: sum(f[other] for other in nulls) / len(nulls) for null in nulls}
    return len(members) * sum((f[e] * _mean([P[e] for P in probabilities]) for e in members), torch.zeros(()))


def _mean(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / max(len(values), 1)


def gradients(objective: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a scalar by name; zeros where it does not depend on a leaf."""
    found = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def check_routing(router: Router, x: Tensor, active: Tensor, real: Tensor | None, *, p: float = 0.0) -> ExpectedRouting:
    """The router against the loop: choices, weights, losses, and the gradient of a random sum of them."""
    leaves = {name: value.detach().double().clone().requires_grad_() for name, value in router.named_parameters()}
    leaves["x"] = x.detach().double().clone().requires_grad_()
    parameters = {name: leaf for name, leaf in leaves.items() if name != "x"}
    want = expected_routing(router, leaves["x"], parameters, active.nonzero().flatten().tolist(), real, p=p)

    got_x = x.detach().clone().requires_grad_()
    got = router(got_x, active, real)
    assert torch.equal(got.mask, want.mask)
    assert_near(got.weights, want.weights, what="weights")
    got_passed = torch.zeros(len(x)) if got.passed_through is None else got.passed_through
    assert_near(got_passed, want.passed_through, got.weights.dtype, what="passed_through")
    assert not got.unrouted.any()
    factors = router.config.aux_loss_weights()
    assert got.aux_losses.keys() == {name for name, factor in factors.items() if factor > 0}
    for name, value in got.aux_losses.items():
        assert_near(value, want.aux_losses[name], what=name)

    generator = torch.Generator().manual_seed(8)
    by_weight = torch.randn(got.weights.shape, generator=generator, dtype=torch.float64)
    by_token = torch.randn(len(x), generator=generator, dtype=torch.float64)

    def total(weights: Tensor, passed: Tensor, losses: dict[str, Tensor]) -> Tensor:
        terms = [factors[name] * losses[name] for name in got.aux_losses]
        return (weights * by_weight).sum() + (passed * by_token).sum() + sum(terms)

    expected_gradients = gradients(total(want.weights, want.passed_through, want.aux_losses), leaves)
    got_leaves = {**dict(router.named_parameters()), "x": got_x}
    for name, grad in gradients(total(got.weights, got_passed, got.aux_losses), got_leaves).items():
        assert_near(grad, expected_gradients[name], what=f"gradient of {name}")
    return want
