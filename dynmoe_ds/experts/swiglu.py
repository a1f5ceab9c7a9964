"""SwiGLU experts: `w2 (silu(w1 x) * (w3 x))`, as in Llama and Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynmoe_ds.experts.experts import Experts, check_sizes, uniform
from dynmoe_ds.experts.grouped_linear import grouped_linear
from dynmoe_ds.experts.host_memory import keep_large_blocks
from dynmoe_ds.experts.slot_by_slot import SlotBySlot, slot_by_slot


class SwiGLUExperts(Experts):
    """w1 [s, F, D] (gate), w3 [s, F, D] (up), w2 [s, D, F] (down)."""

    unit_dims: ClassVar[Mapping[str, int]] = {"w1": 1, "w3": 1, "w2": 2}

    def __init__(self, num_local_slots: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        check_sizes(num_local_slots, hidden_size, ffn_hidden_size)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.w1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w3 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size, ffn_hidden_size))

    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        if rows.device.type == "cpu":
            keep_large_blocks()
            arguments = (rows, row_weights, rows_per_slot.tolist(), self.w1, self.w3, self.w2)
            return SlotBySlot.apply(*arguments) if torch.is_grad_enabled() else slot_by_slot(*arguments)
        return _grouped(rows, row_weights, rows_per_slot, self.w1, self.w3, self.w2)

    def initial(self, seed: int, expert_id: int) -> dict[str, Tensor]:
        width, inner = self.hidden_size, self.ffn_hidden_size
        shapes = {"w1": ((inner, width), width), "w3": ((inner, width), width), "w2": ((width, inner), inner)}
        return {name: uniform(shape, fan_in, seed, expert_id, name) for name, (shape, fan_in) in shapes.items()}


def _grouped(rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """All slots at once: what a GPU wants."""
    gate, up = grouped_linear(rows, w1, rows_per_slot), grouped_linear(rows, w3, rows_per_slot)
    return grouped_linear(_WeightedSwiGLU.apply(gate, up, row_weights), w2, rows_per_slot)


class _WeightedSwiGLU(torch.autograd.Function):
    """`silu(gate) * up * w` [R, F] for gate, up [R, F] and w [R]. Saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, row_weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, row_weights)
        return _weighted_swiglu(gate, up, row_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad_gate, grad_up, grad_weights, _ = _weighted_swiglu_backward(grad, *ctx.saved_tensors)
        return grad_gate, grad_up, grad_weights


def _weighted_swiglu(gate: Tensor, up: Tensor, row_weights: Tensor) -> Tensor:
    """`silu(gate) * up * w` in w's precision, rounded once to gate's."""
    return F.silu(gate.to(row_weights.dtype)).mul_(up).mul_(row_weights[:, None]).to(gate.dtype)


def _weighted_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, row_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate, up and w from that of the weighted product [R, F], and the product itself once more."""
    dtype, column = gate.dtype, row_weights[:, None]
    wide = gate.to(row_weights.dtype)
    silu, weighted = F.silu(wide), grad * column
    grad_up = (weighted * silu).to(dtype)
    product = silu.mul_(up)
    grad_weights = (grad * product).sum(1)
    grad_gate = torch.ops.aten.silu_backward(weighted.mul_(up), wide).to(dtype)
    return grad_gate, grad_up, grad_weights, product.mul_(column).to(dtype)
