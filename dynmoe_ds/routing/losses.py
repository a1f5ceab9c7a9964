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

    Cosines that are 0 but for rounding, as those of rows that have just been made, count as 0, and have no gradient: a
    norm's gradient is of length 1 however small the norm, and would point wherever rounding does.
    Source: arXiv 2405.14297 §3.3.
    """
    deviations = rows @ rows.T - torch.diag(active.to(rows.dtype))
    rounding = 16 * torch.finfo(rows.dtype).eps
    return torch.linalg.vector_norm(torch.where(deviations.abs() > rounding, deviations, 0.0))


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


def num_real_tokens(tokens: Tensor, real: Tensor | None) -> Tensor:
    """Number of real tokens among `tokens` [T, ...], an int64 scalar; `real` [T] bool is False for padding."""
    if real is not None:
        return real.sum()
    return torch.full((), tokens.shape[0], dtype=torch.int64, device=tokens.device)


def token_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean of `values` [T, ...] over the real tokens; 0 without any."""
    if real is not None:
        values = torch.where(real.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return values.sum(0) / num_real_tokens(values, real).clamp_min(1)


def probability_balance(frequency: Tensor, probs: Tensor, num_experts: Tensor, real: Tensor | None) -> Tensor:
    """`M Σ_i f_i Q_i`: f_i how often expert i is chosen [S], a constant; Q_i the mean of its probability [T, S].

    Over the tokens of this rank and micro step. Source: Switch Transformer, arXiv 2101.03961 §2.2.
    """
    return num_experts * (frequency * token_mean(probs, real)).sum()


def z_loss(logits: Tensor, real: Tensor | None) -> Tensor:
    """Mean over tokens of `(log Σ_i exp(logit_i))²` of logits [T, S]. Source: ST-MoE, arXiv 2202.08906."""
    return token_mean(torch.logsumexp(logits, dim=1).square(), real)


def entropy(probs: Tensor, log_probs: Tensor, real: Tensor | None) -> Tensor:
    """Mean over tokens of `−Σ_i P_i log P_i`; both [T, S], with finite logarithms. Source: arXiv 2403.07652."""
    return token_mean(-(probs * log_probs).sum(1), real)
