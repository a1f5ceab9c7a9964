"""Uneven all-to-all that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def exchange_counts(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Counts [P, n] int64, row p from rank p, of the counts [P, n] that every rank sends, row p to rank p.

    Collective: every rank of `group`.
    """
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent.contiguous(), group=group)
    return received


def exchange(
    tensors: tuple[Tensor, ...], sent_splits: list[int], received_splits: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Send `sent_splits[p]` rows of each tensor [N, ...] to rank p; give the rows received, sorted by source rank.

    One autograd node for all tensors, so that the backward collectives run in one order on all ranks, also where a
    gradient is missing or there are zero rows. Collective: every rank of `group`, forwards and backwards.
    """
    return _Exchange.apply(sent_splits, received_splits, group, *tensors)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sent_splits: list[int], received_splits: list[int], group: dist.ProcessGroup, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.splits, ctx.group = (sent_splits, received_splits), group
        return tuple(_all_to_all(tensor, sent_splits, received_splits, group) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, *tuple[Tensor, ...]]:
        sent_splits, received_splits = ctx.splits
        return None, None, None, *(_all_to_all(grad, received_splits, sent_splits, ctx.group) for grad in grads)


def _all_to_all(tensor: Tensor, sent_splits: list[int], received_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    out = tensor.new_empty((sum(received_splits), *tensor.shape[1:]))
    dist.all_to_all_single(out, tensor.contiguous(), received_splits, sent_splits, group=group)
    return out
