"""What happens to all routers' controllers after an optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynmoe_ds.routing.budget import BudgetConfig
from dynmoe_ds.routing.records import RoutingRecords
from dynmoe_ds.routing.router import Router


@torch.no_grad()
def update_routers(
    routers: Mapping[str, Router], records: Mapping[str, RoutingRecords], active: Mapping[str, Tensor]
) -> None:
    """Let every controller take in one optimiser step. A layer without a real token keeps its state.

    routers, records, active [S] bool: by layer. The records must be summed over all data-parallel ranks, so that all
    ranks compute the same state from them. A budget with scope `model` is held over the layers that had tokens and
    moves in all layers that share it, so that they keep one control value. Waits for the device once.
    """
    num_tokens = torch.stack([records[name].num_tokens for name in routers]).tolist() if routers else []
    seen = [name for name, count in zip(routers, num_tokens, strict=True) if count > 0]
    for name in seen:
        routers[name].update(records[name], active[name])
    for sharing in _budget_groups(routers):
        measured = [name for name in sharing if name in seen]
        if measured:
            mean_k = _mean_k([records[name] for name in measured])
            num_live = _mean_live([active[name] for name in measured])
            for name in sharing:
                budget = routers[name].budget
                assert budget is not None, name
                budget.update(mean_k, num_live)


def _budget_groups(routers: Mapping[str, Router]) -> list[list[str]]:
    """The layers of every budget: one layer each with scope `layer`, all with an equal configuration with `model`."""
    alone: list[list[str]] = []
    together: dict[BudgetConfig, list[str]] = {}
    for name, router in routers.items():
        if router.budget is None:
            continue
        if router.budget.config.scope == "layer":
            alone.append([name])
        else:
            together.setdefault(router.budget.config, []).append(name)
    return [*alone, *together.values()]


def _mean_k(records: Sequence[RoutingRecords]) -> Tensor:
    """Mean over layers of their mean k, a float64 scalar."""
    return torch.stack([record.num_assignments.double() / record.num_tokens for record in records]).mean()


def _mean_live(active: Sequence[Tensor]) -> Tensor:
    return torch.stack([layer.sum().double() for layer in active]).mean()
