"""The bytes that one layer's rows cost on the wire, beside the fewest that its masks allow."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.distributed import Traffic


@dataclass(slots=True)
class LayerTraffic:
    """What this rank has sent to others for a layer, and had to.

    sent: counted where it is sent. least_row_bytes: computed from the masks alone, on the device: a row to every other
    rank with a chosen expert and a row back from it, forwards and, where gradients are on, backwards. Of the rows
    back, those for this rank's tokens count, which other ranks send: over a group the two sums are equal.
    """

    sent: Traffic = field(default_factory=Traffic)
    least_row_bytes: int | Tensor = 0

    def expect(self, mask: Tensor, ep_size: int, row_bytes: int, tp_size: int = 1) -> None:
        """Count the rows [D] of `row_bytes` that mask [T, S] asks for, in groups as `Layout` says."""
        own = dist.get_rank() // tp_size % ep_size
        by_rank = mask.view(len(mask), ep_size, mask.shape[1] // ep_size).any(2)
        num_rows = by_rank.sum() - by_rank[:, own].sum()
        directions = 4 if torch.is_grad_enabled() else 2
        self.least_row_bytes = self.least_row_bytes + num_rows * (row_bytes * directions)  # waits for nothing

    def __add__(self, other: LayerTraffic) -> LayerTraffic:
        return LayerTraffic(
            sent=Traffic(
                row_bytes=self.sent.row_bytes + other.sent.row_bytes,
                metadata_bytes=self.sent.metadata_bytes + other.sent.metadata_bytes,
            ),
            least_row_bytes=self.least_row_bytes + other.least_row_bytes,
        )
