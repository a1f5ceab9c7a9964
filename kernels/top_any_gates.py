"""Top-any gates: cosine scores of tokens against gate rows, compared with thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import use_triton


def top_any_gates(
    hidden: Tensor, unit_rows: Tensor, threshold: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine scores [T, S], lengths [T] of the tokens, and which gates are open [T, S] bool, in one pass over `hidden`.

    hidden [T, D]; unit_rows [S, D] of length 1 or 0 and threshold [S], in float32 or wider, as are scores and lengths;
    active [S] bool. A gate is open if its score is above its threshold and its slot active. Scores of zero vectors are
    0, their lengths infinite: divided by that, their gradients are 0, too. The kernel keeps float32's precision in its
    products, whatever torch's setting for TF32.
    """
    if use_triton(hidden, unit_rows, threshold, active):
        from .jit.top_any_gates import launch_top_any_gates

        return launch_top_any_gates(hidden, unit_rows, threshold, active)
    return top_any_gates_torch(hidden, unit_rows, threshold, active)


def cosine_scores_backward(
    grad: Tensor, hidden: Tensor, unit_rows: Tensor, lengths: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T, D] and unit_rows [S, D] from that of the scores [T, S]; lengths [T] as they came out."""
    if use_triton(grad, hidden, unit_rows, lengths, scores):
        from .jit.top_any_gates import launch_cosine_scores_backward

        return launch_cosine_scores_backward(grad, hidden, unit_rows, lengths, scores)
    return cosine_scores_backward_torch(grad, hidden, unit_rows, lengths, scores)


def top_any_gates_torch(
    hidden: Tensor, unit_rows: Tensor, threshold: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `top_any_gates`."""
    wide = hidden.to(unit_rows.dtype)
    lengths = torch.linalg.vector_norm(wide, dim=1)
    lengths = lengths.masked_fill(lengths < 1e-12, torch.inf)
    scores = (wide @ unit_rows.T).div_(lengths[:, None])
    return scores, lengths, (scores > threshold) & active


def cosine_scores_backward_torch(
    grad: Tensor, hidden: Tensor, unit_rows: Tensor, lengths: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """The twin of `cosine_scores_backward`."""
    wide, column = hidden.to(unit_rows.dtype), lengths[:, None]
    grad = grad / column
    # d cos(x, r) / dx = r / |x| − cos(x, r) x / |x|²
    along = (grad * scores).sum(1, keepdim=True).div_(column).neg_()
    return torch.addmm(wide * along, grad, unit_rows).to(hidden.dtype), grad.T @ wide
