"""Cosine scores of tokens against gate rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_ds.routing.losses import divisors


def cosine_scores(hidden: Tensor, unit_rows: Tensor) -> Tensor:
    """Cosine [T, S] of hidden [T, D] with rows [S, D] of length 1 (or 0); 0, without a gradient, for zero vectors.

    One autograd node: normalising by single operations would pass over [T, D] three more times.
    """
    return _CosineScores.apply(hidden, unit_rows)


class _CosineScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, unit_rows: Tensor) -> Tensor:
        length = divisors(hidden)
        scores = (hidden @ unit_rows.T).div_(length)
        ctx.save_for_backward(hidden, unit_rows, length, scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, unit_rows, length, scores = ctx.saved_tensors
        grad = grad / length
        # d cos(x, r) / dx = r / |x| − cos(x, r) x / |x|²
        along = (grad * scores).sum(1, keepdim=True).div_(length).neg_()
        return torch.addmm(hidden * along, grad, unit_rows), grad.T @ hidden


def cosine_quantile(share: Tensor, hidden_size: int) -> Tensor:
    """The cosine, in (-1, 1), that `share` of all directions in `hidden_size` dimensions exceed with a given one.

    c √(D − 1) / √(1 − c²) has Student's distribution of D − 1 degrees of freedom, taken as normal here: the share comes
    out right to 0.03 from 8 dimensions on, to 0.005 from 64 on.
    """
    z = -torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))
    return z / (max(hidden_size - 1, 1) + z.square()).sqrt()
