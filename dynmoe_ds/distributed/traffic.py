"""What a rank sends to other ranks: a counter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

Freight = Literal["rows", "metadata"]


@dataclass(slots=True)
class Traffic:
    """Bytes sent to other ranks, forwards and backwards; what a rank sends to itself is not counted.

    row_bytes: rows [*, D] and their gradients. metadata_bytes: counts, chosen experts, combine weights and their
    gradients.
    """

    row_bytes: int = 0
    metadata_bytes: int = 0

    def note(self, freight: Freight, tensor: Tensor, splits: Sequence[int], group: dist.ProcessGroup) -> None:
        """Add a tensor [N, ...] of which `splits[p]` rows go to rank p of `group`."""
        num_rows = sum(splits) - splits[group.rank()]
        num_bytes = num_rows * tensor[:1].numel() * tensor.element_size() if len(tensor) else 0
        if freight == "rows":
            self.row_bytes += num_bytes
        else:
            self.metadata_bytes += num_bytes
