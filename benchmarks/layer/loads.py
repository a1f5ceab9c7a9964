"""Routers set so that every expert gets the load that is asked for on given tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import dynmoe_ds as dm

HOT_LOAD = 4.0
"""Load of the one busy expert of skewed routing, in units of the mean load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a layer's router does with tokens: mean_k, and the busiest expert's tokens over those of a mean expert."""

    mean_k: float
    busiest: float


def random_tokens(num_tokens: int, hidden_size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal tokens [T, D] whose first channel is 1, so that a gate row's first entry is the bias of its logit."""
    x = torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1.0
    return x.to(dtype)


def wanted_shares(num_experts: int, k: float, routing: str) -> Tensor:
    """The share [E] of all tokens that each expert is to take; they sum to k.

    routing: `uniform`, or `skewed`, where the first takes HOT_LOAD times the mean, or all tokens if that is more.
    """
    shares = torch.full((num_experts,), k / num_experts, dtype=torch.float64)
    if routing == "skewed":
        shares[0] = min(HOT_LOAD * k / num_experts, 1.0)
        shares[1:] = (k - shares[0]) / (num_experts - 1)
    return shares


@torch.no_grad()
def set_loads(layer: dm.MoELayer, x: Tensor, shares: Tensor) -> None:
    """Set what `layer`'s router compares, so that expert e takes about the share shares[e] of the tokens x [T, D].

    All slots must be live, and x[:, 0] must be 1. Thresholds are quantiles of scores, scaled together where a fallback
    adds experts; a softmax's biases and p are found by iteration. Other routers are not known here.
    """
    router, shares = layer.router, shares.to(x.device)
    match router.config:
        case dm.TopAnyConfig():
            scores = _scores(router, x)
            _scale(layer, x, shares, lambda wanted: router.threshold.copy_(_thresholds(scores, wanted)))
        case dm.ExpertThresholdConfig():
            scores = x.float() @ router.weight.float().T
            router.num_updates.fill_(1)
            _scale(layer, x, shares, lambda wanted: router.threshold.copy_(_thresholds(scores, wanted)))
        case dm.ReluConfig():
            router.weight[:, 0] = 0.0
            router.weight[:, 0] = -_thresholds(x.float() @ router.weight.float().T, shares).to(router.weight.dtype)
        case dm.TopKConfig() | dm.TopPConfig():
            _balance(layer, x, shares)
        case other:
            raise ValueError(f"Loads of {type(other).__name__} cannot be set.")


@torch.no_grad()
def measure_load(layer: dm.MoELayer, x: Tensor) -> Load:
    """What the router really does with the tokens x [T, D]."""
    shares = _shares(layer, x)
    return Load(mean_k=shares.sum().item(), busiest=(shares.max() / shares.mean()).item())


def _shares(layer: dm.MoELayer, x: Tensor) -> Tensor:
    return layer.router(x, layer.active, None).mask.double().mean(0)


def _scores(router: torch.nn.Module, x: Tensor) -> Tensor:
    """What top-any compares with its thresholds [T, S], by the definitions of `TopAnyConfig.score`."""
    x, weight = x.float(), router.weight.float()
    if router.config.score == "softmax":
        return F.log_softmax(x @ weight.T, dim=1) + math.log(len(weight))
    return F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T


def _thresholds(scores: Tensor, shares: Tensor) -> Tensor:
    """What the share shares[e] of scores[:, e] exceeds [E]."""
    wanted = (1 - shares).clamp(0, 1).float()
    return torch.stack([torch.quantile(column, q) for column, q in zip(scores.T, wanted, strict=True)])


def _scale(layer: dm.MoELayer, x: Tensor, shares: Tensor, set_shares: Callable[[Tensor], object]) -> None:
    """Set `shares` times the factor at which mean k is their sum: 1 without a fallback, less with one."""
    set_shares(shares)
    if layer.router.config.training_fallback != "top_1":
        return
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        set_shares(middle * shares)
        if _shares(layer, x).sum() < shares.sum():
            low = middle
        else:
            high = middle


def _balance(layer: dm.MoELayer, x: Tensor, shares: Tensor, iterations: int = 80) -> None:
    """Move the bias of every expert, and top-p's p, until the loads are those wanted.

    Steps shrink, as what is moved answers at once but not evenly.
    """
    router = layer.router
    bias = router.weight[:, 0].double()
    logit = 0.0
    is_top_p = isinstance(router.config, dm.TopPConfig)
    floor = 0.5 / len(x)
    for i in range(iterations):
        if is_top_p:
            router.config = replace(router.config, p=1 / (1 + math.exp(-logit)))
        router.weight[:, 0] = bias.to(router.weight.dtype)
        found = _shares(layer, x)
        step = 0.6 * (1 - i / iterations) + 0.02
        wrong = shares.clamp_min(floor).log() - found.clamp_min(floor).log()
        bias = (bias + step * (wrong - wrong.mean())).clamp(-30, 30)
        logit += 2 * step * math.log(shares.sum().item() / max(found.sum().item(), floor))
