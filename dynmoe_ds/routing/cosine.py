"""Cosine scores of tokens against gate rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_ds.routing.losses import divisors

_VALUES_PER_PART = 1 << 16  # in float32 a quarter of a megabyte


def cosine_scores(hidden: Tensor, unit_rows: Tensor) -> Tensor:
    """Cosine [T, S] of hidden [T, D] with rows [S, D] of length 1 (or 0); 0, without a gradient, for zero vectors.

    One autograd node: normalising by single operations would pass over [T, D] three more times.
    """
    return _CosineScores.apply(hidden, unit_rows)


class _CosineScores(torch.autograd.Function):
    """In the precision of `unit_rows`; `hidden` may be narrower, and is widened a few tokens at a time on a CPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, unit_rows: Tensor) -> Tensor:
        scores, length = unit_rows.new_empty(len(hidden), len(unit_rows)), unit_rows.new_empty(len(hidden), 1)
        for i in _parts(hidden):
            wide = hidden[i].to(unit_rows.dtype)
            length[i] = divisors(wide)
            torch.mm(wide, unit_rows.T, out=scores[i])
        scores.div_(length)
        ctx.save_for_backward(hidden, unit_rows, length, scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, unit_rows, length, scores = ctx.saved_tensors
        grad = grad / length
        # d cos(x, r) / dx = r / |x| − cos(x, r) x / |x|²
        along = (grad * scores).sum(1, keepdim=True).div_(length).neg_()
        grad_hidden, grad_rows = torch.empty_like(hidden), torch.zeros_like(unit_rows)
        for i in _parts(hidden):
            wide = hidden[i].to(unit_rows.dtype)
            grad_hidden[i] = torch.mul(wide, along[i]).addmm_(grad[i], unit_rows)
            grad_rows.addmm_(grad[i].T, wide)
        return grad_hidden, grad_rows


def _parts(hidden: Tensor) -> list[slice]:
    """Slices of the tokens of `hidden` [T, D]: on a CPU of so few that a part stays in cache, else all at once."""
    num_tokens, width = hidden.shape
    rows = torch.get_num_threads() * _VALUES_PER_PART // width if hidden.device.type == "cpu" else num_tokens
    rows = max(rows, 1)
    return [slice(first, first + rows) for first in range(0, num_tokens, rows)]


def cosine_quantile(share: Tensor, hidden_size: int) -> Tensor:
    """The cosine, in (-1, 1), that `share` of all directions in `hidden_size` dimensions exceed with a given one.

    c √(D − 1) / √(1 − c²) has Student's distribution of D − 1 degrees of freedom, taken as normal here: the share comes
    out right to 0.03 from 8 dimensions on, to 0.005 from 64 on.
    """
    z = -torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))
    return z / (max(hidden_size - 1, 1) + z.square()).sqrt()
