"""Auxiliary losses of routers, as pure functions on masked tensors. None of them waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(weight: Tensor, active: Tensor) -> Tensor:
    """Rows of `weight` [S, D] scaled to length 1, zero for free slots (`active` [S] bool) and for zero rows."""
    return torch.where(active[:, None], weight / divisors(weight), 0.0)


def divisors(vectors: Tensor) -> Tensor:
    """Length [N, 1] of each of `vectors` [N, D], infinite for zero vectors.

    Divided by it, zero vectors stay zero and get no gradient; a clamped length would give them one of 1 / the clamp.
    """
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return length.masked_fill(length < 1e-12, torch.inf)


def diversity(rows: Tensor, active: Tensor) -> Tensor:
    """`||Ŵ Ŵᵀ − I_K||_F` of the live rows `rows` [S, D], which must be of length 1 and zero for free slots.

    Source: arXiv 2405.14297 §3.3.
    """
    return torch.linalg.vector_norm(rows @ rows.T - torch.diag(active.to(rows.dtype)))


def simplicity(weight: Tensor, active: Tensor) -> Tensor:
    """Mean length of the live rows of `weight` [S, D]: `(1/K) Σ_e |w_e|`.

    Source: arXiv 2405.14297 §3.3.
    """
    lengths = torch.linalg.vector_norm(weight, dim=1)
    return torch.where(active, lengths, 0.0).sum() / active.sum().clamp_min(1)


def load_balance(gates: Tensor, active: Tensor, *, through_shares: bool = False) -> Tensor:
    """`K² · mean_e(me_e · ce_e)`: me = mean of g/k, ce = mean of g, over the tokens with at least one expert.

    gates [T, S]: 1 or 0 with a straight-through gradient, constant 0 for free slots and padding. Over the tokens of
    this rank and micro step; 0 when no token has an expert. Source: the authors' public code.

    As published, the gradient goes through every g with k held constant, and so it closes gates as well as balancing
    them. With `through_shares` it goes through the shares g/k alone, with k differentiated and ce constant: it moves
    load from busy experts to idle ones, and opening all gates alike changes nothing. The value is the same.
    """
    routed = gates.detach().sum(1) > 0
    num_routed = routed.sum().clamp_min(1)
    gates = gates * routed[:, None]  # closed gates of the other tokens are 0, but not their gradient
    k = gates.sum(1, keepdim=True) if through_shares else gates.detach().sum(1, keepdim=True)
    me = (gates / k.where(routed[:, None], 1.0)).sum(0) / num_routed
    ce = (gates.detach() if through_shares else gates).sum(0) / num_routed
    return active.sum() * (me * ce).sum()  # K² · (1/K) Σ_e


def mean_open(gates: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Mean number of open gates per real token (`gates` [T, S], padding 0)."""
    count = max(num_tokens, 1) if isinstance(num_tokens, int) else num_tokens.clamp_min(1)
    return gates.sum() / count
