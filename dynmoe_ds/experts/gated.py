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
from dynmoe_ds.experts.slot_by_slot import SlotBySlot, slot_by_slot
from dynmoe_kernels import Activation

_SMALL_SLOT_BYTES = 1 << 17
"""Of one activation of a slot. Up to it all slots at once are 5 to 45 % faster on a CPU; above, they are not worth the
four activations [N, F] more in memory in the backward pass.
"""


class GatedExperts(Experts):
    """w1 [s, F, D] (gate), w3 [s, F, D] (up), w2 [s, D, F] (down)."""

    unit_dims: ClassVar[Mapping[str, int]] = {"w1": 1, "w3": 1, "w2": 2}

    def __init__(self, num_local_slots: int, hidden_size: int, ffn_hidden_size: int, activation: Activation) -> None:
        super().__init__(num_local_slots, hidden_size, ffn_hidden_size, activation)
        self.w1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w3 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.w2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size, ffn_hidden_size))

    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        if rows.device.type == "cpu":
            keep_large_blocks()
            counts = rows_per_slot.tolist()
            if self.activation == "silu" and not self._are_small(counts, rows.element_size()):
                arguments = (rows, row_weights, counts, self.w1, self.w3, self.w2)
                return SlotBySlot.apply(*arguments) if torch.is_grad_enabled() else slot_by_slot(*arguments)
            if not torch.is_grad_enabled():
                return few_slots_at_once(self._all_slots, rows, row_weights, counts, self.w1, self.w3, self.w2)
        slot_ends = rows_per_slot.cumsum(0, dtype=torch.int32)
        return self._all_slots(rows, row_weights, slot_ends, self.w1, self.w3, self.w2)

    def _all_slots(self, *arguments: Tensor) -> Tensor:
        output: Tensor = GatedOfAllSlots.apply(*arguments, self.activation)
        return output

    def _are_small(self, rows_per_slot: list[int], element_size: int) -> bool:
        """Whether slots are so small, on average, that calls for each cost more than reading activations from memory.

        Not for inference, which wants no activations of all slots.
        """
        used = [count for count in rows_per_slot if count > 0]
        num_bytes = sum(used) * self.ffn_hidden_size * element_size
        return torch.is_grad_enabled() and num_bytes <= len(used) * _SMALL_SLOT_BYTES

    def initial(self, seed: int, expert_id: int) -> dict[str, Tensor]:
        width, inner = self.hidden_size, self.ffn_hidden_size
        shapes = {"w1": ((inner, width), width), "w3": ((inner, width), width), "w2": ((width, inner), inner)}
        return {name: uniform(shape, fan_in, seed, expert_id, name) for name, (shape, fan_in) in shapes.items()}
