"""Gated experts: `w2 (activation(w1 x) * (w3 x))`, as in Llama and Mixtral (SwiGLU) and in Gemma (GEGLU)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from dynmoe_ds.experts.all_slots import GatedOfAllSlots
from dynmoe_ds.experts.experts import Experts, uniform
from dynmoe_ds.experts.few_slots import few_slots_at_once
from dynmoe_ds.experts.host_memory import keep_large_blocks
from dynmoe_ds.experts.swiglu_slots import SwigluSlots
from dynmoe_kernels import Activation, can_compute_swiglu_slots, swiglu_slots


class GatedExperts(Experts):
    """w1 [s, F, D] (gate), w3 [s, F, D] (up), w2 [s, D, F] (down)."""

    unit_dims: ClassVar[Mapping[str, int]] = {"w1": 1, "w3": 1, "w2": 2}

    def __init__(self, num_local_slots: int, hidden_size: int, ffn_hidden_size: int, activation: Activation) -> None:
        super().__init__(num_local_slots, hidden_size, ffn_hidden_size, activation)
        self.w1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w3 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size, ffn_hidden_size))

    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        parameters = (self.w1, self.w3, self.w2)
        if rows.device.type == "cpu":
            keep_large_blocks()
            counts = rows_per_slot.tolist()
            if self.activation == "silu" and can_compute_swiglu_slots(rows, row_weights, *parameters):
                compute = SwigluSlots.apply if torch.is_grad_enabled() else swiglu_slots
                return compute(rows, row_weights, counts, *parameters)
            if not torch.is_grad_enabled():
                return few_slots_at_once(self._all_slots, rows, row_weights, counts, *parameters)
        slot_ends = rows_per_slot.cumsum(0, dtype=torch.int32)
        return self._all_slots(rows, row_weights, slot_ends, *parameters)

    def _all_slots(self, *arguments: Tensor) -> Tensor:
        output: Tensor = GatedOfAllSlots.apply(*arguments, self.activation)
        return output

    def initial(self, seed: int, expert_id: int) -> dict[str, Tensor]:
        width, inner = self.hidden_size, self.ffn_hidden_size
        shapes = {"w1": ((inner, width), width), "w3": ((inner, width), width), "w2": ((width, inner), inner)}
        return {name: uniform(shape, fan_in, seed, expert_id, name) for name, (shape, fan_in) in shapes.items()}
