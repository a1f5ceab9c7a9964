"""Cosine scores of tokens against gate rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_kernels import cosine_scores_backward, top_any_gates


def cosine_gates(hidden: Tensor, unit_rows: Tensor, threshold: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine [T, S] of hidden [T, D] with rows [S, D] of length 1 (or 0), and where it passes threshold [S].

    0, without a gradient, for zero vectors. Gates of slots that are not active [S] are closed. In the precision of
    unit_rows and threshold; hidden may be narrower. One autograd node: normalising by single operations would pass over
    [T, D] three more times.
    """
    scores, is_open = _CosineGates.apply(hidden, unit_rows, threshold.detach(), active)
    return scores, is_open


def cosine_scores(hidden: Tensor, unit_rows: Tensor) -> Tensor:
    """The cosines of `cosine_gates` alone."""
    size = len(unit_rows)
    return cosine_gates(hidden, unit_rows, unit_rows.new_zeros(size), unit_rows.new_ones(size, dtype=torch.bool))[0]


class _CosineGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unit_rows: Tensor, threshold: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores, lengths, is_open = top_any_gates(hidden, unit_rows, threshold, active)
        ctx.save_for_backward(hidden, unit_rows, lengths, scores)
        ctx.mark_non_differentiable(is_open)
        return scores, is_open

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, unit_rows, lengths, scores = ctx.saved_tensors
        return *cosine_scores_backward(grad.contiguous(), hidden, unit_rows, lengths, scores), None, None


def cosine_quantile(share: Tensor, hidden_size: int) -> Tensor:
    """The cosine, in (-1, 1), that `share` of all directions in `hidden_size` dimensions exceed with a given one.

    c √(D − 1) / √(1 − c²) has Student's distribution of D − 1 degrees of freedom, taken as normal here: the share comes
    out right to 0.03 from 8 dimensions on, to 0.005 from 64 on.
    """
    z = -torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))
    return z / (max(hidden_size - 1, 1) + z.square()).sqrt()
