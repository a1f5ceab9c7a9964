"""Uneven all-to-all that gradients flow through, and that other work can run beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynmoe_ds.distributed.stalls import communication
from dynmoe_ds.distributed.traffic import Freight, Traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """How many rows go to each rank of a group, and how many come from each."""

    sent: Sequence[int]
    received: Sequence[int]

    def reversed(self) -> Splits:
        """The way back."""
        return Splits(sent=self.received, received=self.sent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """A tensor [N, ...] to be sent, its rows sorted by destination."""

    tensor: Tensor
    splits: Splits
    freight: Freight = "rows"


def exchange_counts(sent: Tensor, group: dist.ProcessGroup, traffic: Traffic | None = None) -> Tensor:
    """Counts [P, n] int64, row p from rank p, of the counts [P, n] that every rank sends, row p to rank p.

    Collective: every rank of `group`.
    """
    received, sent = torch.empty_like(sent), sent.contiguous()
    with communication(group):
        dist.all_to_all_single(received, sent, group=group)
    if traffic is not None:
        traffic.note("metadata", sent, [1] * group.size(), group)
    return received


class Flight:
    """Tensors on their way to other ranks.

        flight = Flight([Parcel(tensor=rows, splits=splits)], group)
        ...                       # work that runs beside the communication
        (received,) = flight.wait()

    The backward pass mirrors this, since autograd runs nodes in the reverse of the order in which they were made. All
    tensors share one node, so that the backward collectives run in one order on all ranks, also where the gradient of
    one is missing or there are zero rows. Where no tensor of a rank needs a gradient, as with a frozen router over
    frozen embeddings, that must be so on all ranks. Integer tensors travel forwards only.

    Collective: every rank of `group` makes it and waits for it, with the same tensors but for their rows.
    """

    def __init__(self, parcels: Sequence[Parcel], group: dist.ProcessGroup, traffic: Traffic | None = None) -> None:
        self._group, self._traffic = group, traffic
        self._works: list[tuple[dist.Work, Tensor]] = []
        self._is_float = [parcel.tensor.is_floating_point() for parcel in parcels]
        integers = [parcel for parcel in parcels if not parcel.tensor.is_floating_point()]
        self._received_integers = [self._send(p.tensor, p.splits, p.freight) for p in integers]
        floats = [parcel for parcel in parcels if parcel.tensor.is_floating_point()]
        # Not the parcels: the backward pass, which needs these, must not keep what was sent alive.
        self._ways = [(parcel.splits, parcel.freight) for parcel in floats]
        self._received_floats: tuple[Tensor, ...] = ()
        self._tickets: tuple[Tensor, ...] = _Start.apply(self, *(parcel.tensor for parcel in floats))

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors [R, ...] received, in the order of the parcels, each sorted by source rank. Call it once."""
        floats, integers = iter(_Wait.apply(self, *self._tickets)), iter(self._received_integers)
        self._tickets, self._received_floats, self._received_integers = (), (), []
        return tuple(next(floats if is_float else integers) for is_float in self._is_float)

    def _send_floats(self, tensors: Sequence[Tensor]) -> None:
        pairs = zip(tensors, self._ways, strict=True)
        self._received_floats = tuple(self._send(tensor, *way) for tensor, way in pairs)

    def _send_gradients(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pairs = zip(grads, self._ways, strict=True)
        return tuple(self._send(grad, splits.reversed(), freight) for grad, (splits, freight) in pairs)

    def _send(self, tensor: Tensor, splits: Splits, freight: Freight) -> Tensor:
        """What is received; not to be read before `_land`."""
        tensor = tensor.contiguous()
        received = tensor.new_empty((sum(splits.received), *tensor.shape[1:]))
        work = dist.all_to_all_single(
            received, tensor, list(splits.received), list(splits.sent), group=self._group, async_op=True
        )
        self._works.append((work, tensor))  # the tensor must live until it is sent
        if self._traffic is not None:
            self._traffic.note(freight, tensor, splits.sent, self._group)
        return received

    def _land(self) -> None:
        """Wait until everything that was sent last is here."""
        with communication(self._group):
            while self._works:
                self._works.pop(0)[0].wait()


class _Start(torch.autograd.Function):
    """Sends the tensors and gives them back as tickets for `_Wait`, so that gradients have the shapes of what was sent.

    In the backward pass it waits for the gradients that `_Wait` has sent.
    """

    @staticmethod
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        flight._send_floats(tensors)
        return tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight._land()
        return None, *grads


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *tickets: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        flight._land()
        return flight._received_floats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent = ctx.flight._send_gradients(grads)
        if torch.is_anomaly_enabled():
            ctx.flight._land()  # it reads what a node gives, which nobody else may do before `_Start` has waited
        return None, *sent
