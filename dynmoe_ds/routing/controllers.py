"""What happens to all routers' controllers after an optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynmoe_ds.routing.records import RoutingRecords
from dynmoe_ds.routing.router import Router


@torch.no_grad()
def update_routers(
    routers: Mapping[str, Router], records: Mapping[str, RoutingRecords], active: Mapping[str, Tensor]
) -> None:
    """Let every controller take in one optimiser step. A layer without a real token keeps its state.

    routers, records, active [S] bool: by layer. The records must be summed over all data-parallel ranks, so that all
    ranks compute the same state from them. Waits for the device once.
    """
    num_tokens = torch.stack([records[name].num_tokens for name in routers]).tolist() if routers else []
    seen = [name for name, count in zip(routers, num_tokens, strict=True) if count > 0]
    shared: list[str] = []
    for name in seen:
        routers[name].update(records[name], active[name])
        budget = routers[name].budget
        if budget is not None and budget.config.scope == "layer":
            budget.update(_mean_k([records[name]]), _mean_live([active[name]]))
        elif budget is not None:
            shared.append(name)
    if shared:
        mean_k, num_live = _mean_k([records[name] for name in shared]), _mean_live([active[name] for name in shared])
        for name in shared:
            budget = routers[name].budget
            assert budget is not None
            budget.update(mean_k, num_live)


def _mean_k(records: Sequence[RoutingRecords]) -> Tensor:
    """Mean over layers of their mean k, a float64 scalar."""
    return torch.stack([record.num_assignments.double() / record.num_tokens for record in records]).mean()


def _mean_live(active: Sequence[Tensor]) -> Tensor:
    return torch.stack([layer.sum().double() for layer in active]).mean()
