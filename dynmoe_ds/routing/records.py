"""Routing records: the additive counts that growth and pruning are decided from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from dynmoe_ds.routing.router import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRecords:
    """What one layer saw, in numbers that add up over micro steps, steps and ranks. Padding is in none of them.

    tokens_per_slot [S] int64: tokens sent to each slot. num_tokens, num_assignments, num_unrouted: 0-d int64 tensors,
    so that recording never waits for the device. unrouted_sum [D] float64: sum of the hidden vectors of the tokens that
    chose no expert before any fallback (R_S of Algorithm 1). statistics: further additive float64 tensors by name, such
    as what a router's controller learns from.
    """

    tokens_per_slot: Tensor
    num_tokens: Tensor
    num_assignments: Tensor
    num_unrouted: Tensor
    unrouted_sum: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def zeros(
        cls, num_slots: int, hidden_size: int, statistics: Mapping[str, tuple[int, ...]], device: torch.device
    ) -> RoutingRecords:
        """Records of no token. statistics: shapes by name."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return cls(
            tokens_per_slot=torch.zeros(num_slots, dtype=torch.int64, device=device),
            num_tokens=zero,
            num_assignments=zero,
            num_unrouted=zero,
            unrouted_sum=torch.zeros(hidden_size, dtype=torch.float64, device=device),
            statistics={
                name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in statistics.items()
            },
        )

    @classmethod
    def of(cls, routing: Routing, hidden: Tensor, real: Tensor | None) -> RoutingRecords:
        """The records of one routing of `hidden` [T, D]; `real` [T] bool is False for padding."""
        with torch.no_grad():
            tokens_per_slot = routing.mask.sum(0)
            num_tokens = (
                torch.full((), hidden.shape[0], dtype=torch.int64, device=hidden.device) if real is None else real.sum()
            )
            return cls(
                tokens_per_slot=tokens_per_slot,
                num_tokens=num_tokens,
                num_assignments=tokens_per_slot.sum(),
                num_unrouted=routing.unrouted.sum(),
                unrouted_sum=sum_of(hidden, routing.unrouted, may_wait=hidden.device.type == "cpu").double(),
                statistics={name: value.detach().double() for name, value in (routing.statistics or {}).items()},
            )

    def __add__(self, other: RoutingRecords) -> RoutingRecords:
        return RoutingRecords(
            tokens_per_slot=self.tokens_per_slot + other.tokens_per_slot,
            num_tokens=self.num_tokens + other.num_tokens,
            num_assignments=self.num_assignments + other.num_assignments,
            num_unrouted=self.num_unrouted + other.num_unrouted,
            unrouted_sum=self.unrouted_sum + other.unrouted_sum,
            statistics=_add(self.statistics, other.statistics),
        )

    @property
    def mean_k(self) -> float:
        """Experts per real token, fallback included; 0 without tokens. Waits for the device."""
        return float(self.num_assignments) / max(float(self.num_tokens), 1.0)

    @property
    def unrouted_share(self) -> float:
        """Share of the real tokens that chose no expert; 0 without tokens. Waits for the device."""
        return float(self.num_unrouted) / max(float(self.num_tokens), 1.0)


def sum_of(hidden: Tensor, chosen: Tensor, *, may_wait: bool) -> Tensor:
    """The sum [D] of the chosen [T] rows of hidden [T, D], in the model's precision or better.

    What the other rows hold, be it NaN, is not in it. may_wait: whether the number of chosen rows may be asked for.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if may_wait:  # few rows, as a rule
        return hidden[chosen].sum(0, dtype=wide)
    return torch.where(chosen[:, None], hidden, 0.0).sum(0, dtype=wide)


def _add(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return a | {name: a[name] + value if name in a else value for name, value in b.items()}


def pack(records: Mapping[str, RoutingRecords]) -> Tensor:
    """All layers' records as one flat float64 tensor (counts are exact up to 2**53), in the mapping's order."""
    parts = []
    for record in records.values():
        counts = (record.tokens_per_slot, record.num_tokens, record.num_assignments, record.num_unrouted)
        parts += [count.reshape(-1).double() for count in counts] + [record.unrouted_sum]
        parts += [record.statistics[name].reshape(-1) for name in sorted(record.statistics)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def unpack(flat: Tensor, like: Mapping[str, RoutingRecords]) -> dict[str, RoutingRecords]:
    """The inverse of `pack` for records of the same layers and shapes as `like`."""
    out, at = {}, 0
    for name, record in like.items():
        num_slots, hidden_size = record.tokens_per_slot.numel(), record.unrouted_sum.numel()
        counts = flat[at : at + num_slots + 3].round().long()
        at += num_slots + 3
        unrouted_sum = flat[at : at + hidden_size].clone()
        at += hidden_size
        statistics = {}
        for key in sorted(record.statistics):
            shape = record.statistics[key].shape
            statistics[key] = flat[at : at + prod(shape)].view(shape).clone()
            at += prod(shape)
        out[name] = RoutingRecords(
            tokens_per_slot=counts[:num_slots],
            num_tokens=counts[num_slots],
            num_assignments=counts[num_slots + 1],
            num_unrouted=counts[num_slots + 2],
            unrouted_sum=unrouted_sum,
            statistics=statistics,
        )
    return out
