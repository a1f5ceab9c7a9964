"""Experts of two layers: `w2 activation(w1 x + b1) + b2`, as in BERT and ViT (GELU), Phi and SigLIP, and CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from dynmoe_ds.experts.all_slots import TwoLayersOfAllSlots
from dynmoe_ds.experts.experts import Experts, uniform
from dynmoe_ds.experts.few_slots import few_slots_at_once
from dynmoe_ds.experts.host_memory import keep_large_blocks
from dynmoe_kernels import Activation


class TwoLayerExperts(Experts):
    """w1 [s, F, D], b1 [s, F], w2 [s, D, F], b2 [s, D]."""

    unit_dims: ClassVar[Mapping[str, int]] = {"w1": 1, "b1": 1, "w2": 2}

    def __init__(self, num_local_slots: int, hidden_size: int, ffn_hidden_size: int, activation: Activation) -> None:
        super().__init__(num_local_slots, hidden_size, ffn_hidden_size, activation)
        self.w1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.b1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size))
        self.w2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size, ffn_hidden_size))
        self.b2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size))

    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        parameters = (self.w1, self.b1, self.w2, self.b2)
        if rows.device.type == "cpu":
            keep_large_blocks()
            if not torch.is_grad_enabled():
                return few_slots_at_once(self._all_slots, rows, row_weights, rows_per_slot.tolist(), *parameters)
        return self._all_slots(rows, row_weights, rows_per_slot.cumsum(0, dtype=torch.int32), *parameters)

    def _all_slots(self, *arguments: Tensor) -> Tensor:
        output: Tensor = TwoLayersOfAllSlots.apply(*arguments, self.activation)
        return output

    def initial(self, seed: int, expert_id: int) -> dict[str, Tensor]:
        D, F_ = self.hidden_size, self.ffn_hidden_size
        shapes: dict[str, tuple[tuple[int, ...], int]] = {
            "w1": ((F_, D), D),
            "b1": ((F_,), D),
            "w2": ((D, F_), F_),
            "b2": ((D,), F_),
        }
        return {name: uniform(shape, fan_in, seed, expert_id, name) for name, (shape, fan_in) in shapes.items()}
