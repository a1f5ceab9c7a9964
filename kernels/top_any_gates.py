"""Top-any gates: cosine scores of tokens against gate rows, compared with thresholds."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu.gate_scores import can_compute_gate_scores, gate_cosines, gate_scores_backward
from .selection import use_triton

_VALUES_PER_PART = 1 << 16  # in float32 a quarter of a megabyte


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
    if can_compute_gate_scores(hidden, unit_rows):
        scores, lengths = gate_cosines(hidden, unit_rows)
        return scores, lengths, (scores > threshold) & active
    return top_any_gates_torch(hidden, unit_rows, threshold, active)


def cosine_scores_backward(
    grad: Tensor, hidden: Tensor, unit_rows: Tensor, lengths: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [T, D] and unit_rows [S, D] from that of the scores [T, S]; lengths [T] as they came out."""
    if use_triton(grad, hidden, unit_rows, lengths, scores):
        from .jit.top_any_gates import launch_cosine_scores_backward

        return launch_cosine_scores_backward(grad, hidden, unit_rows, lengths, scores)
    if can_compute_gate_scores(hidden, unit_rows):
        grad_hidden, grad_rows = gate_scores_backward(grad, hidden, unit_rows, (scores, lengths), (True, True))
        assert grad_hidden is not None and grad_rows is not None
        return grad_hidden, grad_rows
    return cosine_scores_backward_torch(grad, hidden, unit_rows, lengths, scores)


def top_any_gates_torch(
    hidden: Tensor, unit_rows: Tensor, threshold: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `top_any_gates`."""
    scores, lengths = unit_rows.new_empty(len(hidden), len(unit_rows)), unit_rows.new_empty(len(hidden))
    for i in _parts(hidden):
        wide = hidden[i].to(unit_rows.dtype)
        torch.linalg.vector_norm(wide, dim=1, out=lengths[i])
        torch.mm(wide, unit_rows.T, out=scores[i])
    lengths.masked_fill_(lengths < 1e-12, torch.inf)
    scores.div_(lengths[:, None])
    return scores, lengths, (scores > threshold) & active


def cosine_scores_backward_torch(
    grad: Tensor, hidden: Tensor, unit_rows: Tensor, lengths: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """The twin of `cosine_scores_backward`."""
    grad = grad / lengths[:, None]
    # d cos(x, r) / dx = r / |x| − cos(x, r) x / |x|²
    along = (grad * scores).sum(1).div_(lengths).neg_()
    grad_hidden, grad_rows = torch.empty_like(hidden), torch.zeros_like(unit_rows)
    for i in _parts(hidden):
        wide = hidden[i].to(unit_rows.dtype)
        grad_hidden[i] = torch.mul(wide, along[i, None]).addmm_(grad[i], unit_rows)
        grad_rows.addmm_(grad[i].T, wide)
    return grad_hidden, grad_rows


def _parts(hidden: Tensor) -> list[slice]:
    """Slices of the tokens of `hidden` [T, D]: on a CPU of so few that a part stays in cache, else all at once."""
    num_tokens, width = hidden.shape
    rows = torch.get_num_threads() * _VALUES_PER_PART // width if hidden.device.type == "cpu" else num_tokens
    rows = max(rows, 1)
    return [slice(first, first + rows) for first in range(0, num_tokens, rows)]
