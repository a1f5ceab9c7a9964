"""SwiGLU experts: `w2 (silu(w1 x) * (w3 x))`, as in Llama and Mixtral."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynmoe_ds.experts.experts import Experts, check_sizes, uniform
from dynmoe_ds.experts.grouped_linear import grouped_linear

_CPU_CHUNK_BYTES = 1 << 20  # rows are worked on in pieces that stay in a core's cache


class SwiGLUExperts(Experts):
    """w1 [s, F, D] (gate), w3 [s, F, D] (up), w2 [s, D, F] (down)."""

    def __init__(self, num_local_slots: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        check_sizes(num_local_slots, hidden_size, ffn_hidden_size)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.w1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w3 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size, ffn_hidden_size))

    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        gate = grouped_linear(rows, self.w1, rows_per_slot)
        up = grouped_linear(rows, self.w3, rows_per_slot)
        return grouped_linear(_WeightedSwiGLU.apply(gate, up, row_weights), self.w2, rows_per_slot)

    def initial(self, seed: int, expert_id: int) -> dict[str, Tensor]:
        D, F = self.hidden_size, self.ffn_hidden_size
        shapes = {"w1": ((F, D), D), "w3": ((F, D), D), "w2": ((D, F), F)}
        return {name: uniform(shape, fan_in, seed, expert_id, name) for name, (shape, fan_in) in shapes.items()}


class _WeightedSwiGLU(torch.autograd.Function):
    """`silu(gate) * up * w` [R, F] for gate, up [R, F] and w [R], computed in w's precision and rounded once.

    Saves its inputs only. On a CPU the rows go through in pieces, without temporaries of full size.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, row_weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, row_weights)
        out = torch.empty_like(gate)
        for a, b, w, o in _pieces(gate, up, row_weights, out):
            wide = a.to(w.dtype)
            o.copy_(torch.sigmoid(wide).mul_(wide).mul_(b).mul_(w[:, None]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, row_weights = ctx.saved_tensors
        grad_gate, grad_up, grad_weights = (torch.empty_like(t) for t in (gate, up, row_weights))
        pieces = _pieces(gate, up, row_weights, grad, grad_gate, grad_up, grad_weights)
        for a, b, w, g, out_a, out_b, out_w in pieces:
            wide, g_wide = a.to(w.dtype), g.to(w.dtype)
            sigmoid = torch.sigmoid(wide)
            silu = sigmoid * wide
            per_up = g_wide * silu
            torch.linalg.vecdot(per_up, b.to(w.dtype), out=out_w)
            out_b.copy_(per_up.mul_(w[:, None]))
            # d silu / d gate = σ + silu (1 − σ)
            slope = sigmoid.add_(silu.mul_(1 - sigmoid))
            out_a.copy_(slope.mul_(g_wide).mul_(b).mul_(w[:, None]))
        return grad_gate, grad_up, grad_weights


def _pieces(first: Tensor, *others: Tensor) -> Any:
    """The tensors, which share their first dimension, side by side in pieces of rows."""
    num_rows, row_bytes = first.shape[0], first.shape[1] * first.element_size()
    step = max(_CPU_CHUNK_BYTES // row_bytes, 1) if first.device.type == "cpu" else max(num_rows, 1)
    return zip(*(tensor.split(step) for tensor in (first, *others)), strict=True)
