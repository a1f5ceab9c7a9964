"""From scores to chosen experts: what routers with a gate per expert share."""

from __future__ import annotations

import torch
from torch import Tensor


def eligible_pairs(active: Tensor, real: Tensor | None, num_tokens: int) -> Tensor:
    """Which of T tokens may take which slots [T, S] bool: live ones (`active` [S]), and padding none (`real` [T])."""
    return active.expand(num_tokens, -1) if real is None else active & real[:, None]


def without_choice(chosen: Tensor, real: Tensor | None) -> Tensor:
    """Tokens [T] bool that have chosen nothing (`chosen` [T, S] bool); padding is not among them."""
    return ~chosen.any(1) if real is None else ~chosen.any(1) & real


def keep_greatest(chosen: Tensor, margins: Tensor, k_max: int | None) -> Tensor:
    """`chosen` [T, S] bool with at most `k_max` per token, those of the greatest `margins` [T, S]; None for all."""
    if k_max is None or k_max >= chosen.shape[1]:
        return chosen
    greatest = margins.detach().masked_fill(~chosen, -torch.inf).topk(k_max, dim=1).indices
    return chosen & torch.zeros_like(chosen).scatter(1, greatest, True)


def best_expert(tokens: Tensor, merits: Tensor, active: Tensor) -> Tensor:
    """[T, S] bool: for each of `tokens` [T] bool the live slot of the greatest of `merits` [T, S], else nothing."""
    best = merits.detach().masked_fill(~active, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(merits, dtype=torch.bool).scatter(1, best, tokens[:, None])
