"""GELU experts: `w2 gelu(w1 x + b1) + b2`, as in BERT, ViT and GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynmoe_ds.experts.experts import Experts, check_sizes, uniform
from dynmoe_ds.experts.grouped_linear import grouped_linear


class GELUExperts(Experts):
    """w1 [s, F, D], b1 [s, F], w2 [s, D, F], b2 [s, D]; the exact GELU (erf)."""

    unit_dims: ClassVar[Mapping[str, int]] = {"w1": 1, "b1": 1, "w2": 2}

    def __init__(self, num_local_slots: int, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        check_sizes(num_local_slots, hidden_size, ffn_hidden_size)
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.w1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size, hidden_size))
        self.b1 = nn.Parameter(torch.zeros(num_local_slots, ffn_hidden_size))
        self.w2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size, ffn_hidden_size))
        self.b2 = nn.Parameter(torch.zeros(num_local_slots, hidden_size))

    def forward(self, rows: Tensor, row_weights: Tensor, rows_per_slot: Tensor) -> Tensor:
        num_rows, scale = rows.shape[0], row_weights[:, None]
        b1, b2 = (bias.repeat_interleave(rows_per_slot, dim=0, output_size=num_rows) for bias in (self.b1, self.b2))
        inner = F.gelu(grouped_linear(rows, self.w1, rows_per_slot) + b1)
        # The weight goes inside w2, rounded once to the model's dtype.
        out = grouped_linear((inner * scale).to(rows.dtype), self.w2, rows_per_slot)
        return out + (b2 * scale).to(rows.dtype)

    def initial(self, seed: int, expert_id: int) -> dict[str, Tensor]:
        D, F_ = self.hidden_size, self.ffn_hidden_size
        shapes: dict[str, tuple[tuple[int, ...], int]] = {
            "w1": ((F_, D), D),
            "b1": ((F_,), D),
            "w2": ((D, F_), F_),
            "b2": ((D,), F_),
        }
        return {name: uniform(shape, fan_in, seed, expert_id, name) for name, (shape, fan_in) in shapes.items()}
