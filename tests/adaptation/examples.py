"""Records and placements that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynmoe_ds.moe import Placement
from dynmoe_ds.moe.ledger import STRAIN
from dynmoe_ds.routing import RoutingRecords


def records(
    tokens_per_slot: Sequence[int],
    *,
    num_tokens: int = 100,
    num_unrouted: int = 0,
    unrouted_sum: Sequence[float] = (0, 0),
    strain: Sequence[float] | None = None,
) -> RoutingRecords:
    """Records of one layer with hidden size 2, written out."""
    return RoutingRecords(
        tokens_per_slot=torch.tensor(tokens_per_slot),
        num_tokens=torch.tensor(num_tokens),
        num_assignments=torch.tensor(sum(tokens_per_slot)),
        num_unrouted=torch.tensor(num_unrouted),
        unrouted_sum=torch.tensor(unrouted_sum, dtype=torch.float64),
        statistics={} if strain is None else {STRAIN: torch.tensor(strain, dtype=torch.float64)},
    )


def placement(*expert_ids: int | None, next_id: int = 10, ep_size: int = 1) -> Placement:
    return Placement(expert_ids=expert_ids, next_id=next_id, ep_size=ep_size)
