"""NaN and infinity in what a step computes: found on all ranks together, before anything is updated, with their origin.

Every float tensor that is watched is reduced to its least and its greatest value, which a NaN or an infinity survives
and which no finite value can make overflow, as it can a sum. They stay on the device until the end of gradient
accumulation, where one number is agreed on by all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynmoe_ds.distributed import communication
from dynmoe_ds.engine.left_out import watch_gradient_norm
from dynmoe_ds.moe import MoELayer
from dynmoe_ds.routing import RoutingRecords
from dynmoe_ds.routing.records import pack

OnNonFinite = Literal["stop", "skip_step"]

MAX_LEFT_OUT_IN_A_ROW = 10
"""After so many updates left out one after another the next one stops the run: they no longer heal anything."""

Kind = Literal["input", "aux_loss", "output", "records", "loss", "gradient", "norm"]

_PLACES: dict[Kind, str] = {
    "input": "the input of {}, so what comes before that layer made it",
    "aux_loss": "the auxiliary losses of {}",
    "output": "the output of {}",
    "records": "the records of {}",
    "loss": "the loss",
    "gradient": "the gradient of {}",
    "norm": "the norm of all gradients, each of which is finite on its own rank: its square does not fit into float32",
}
_SEVERAL: dict[Kind, str] = {
    "input": "the input of {}",
    "aux_loss": "the auxiliary losses of {}",
    "output": "the output of {}",
    "records": "the records of {}",
    "loss": "the loss",
    "gradient": "the gradients of {}",
    "norm": "the norm of all gradients",
}
# Within a micro step a fault spreads in this order. Inside a forward pass, and inside a backward pass, time decides.
_STAGES: dict[Kind, int] = {"input": 0, "aux_loss": 0, "output": 0, "records": 1, "loss": 2, "gradient": 3, "norm": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is not finite on one rank. position: its place in time within the micro step.

    records and norm, which are of the whole step, stand in its last micro step.
    """

    kind: Kind
    name: str
    has_nan: bool
    micro_step: int
    position: int

    def time(self) -> tuple[int, int, int]:
        """What sorts findings by when they happened, the origin first."""
        return self.micro_step, _STAGES[self.kind], self.position


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """What all ranks found in one step. text: where it began and where it went, equal on all ranks.

    bad_weights: names of parameters that are not finite themselves, so that leaving out updates cannot help.
    """

    text: str
    bad_weights: tuple[str, ...] = ()


class NonFiniteWatch:
    """Watches what one engine computes. Between the first forward pass of a step and `take` it keeps numbers only."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._is_in_backward = False
        self._labels: list[tuple[Kind, str]] = []
        self._extremes: list[Tensor] = []
        self._micro_steps: list[tuple[list[tuple[Kind, str]], Tensor]] = []

    def attach(self, deepspeed_engine: Any) -> None:
        """Watch the gradients of an engine's parameters as this rank computes them, before they are reduced.

        Call it again whenever the engine, its optimiser or its parameters were replaced: only those are watched then.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = [
            param.register_hook(partial(self._note_gradient, name))
            for name, param in deepspeed_engine.module.named_parameters()
            if param.requires_grad
        ]
        watch_gradient_norm(deepspeed_engine.optimizer)
        self.clear()

    def note_layer(self, layer: MoELayer, kind: Literal["input", "aux_loss", "output"], value: Tensor) -> None:
        """Take in a value that `layer` met or made in a forward pass; what a `StepLedger` calls."""
        self._note(kind, layer.name or type(layer).__name__, value)

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Around the backward pass of a micro step: takes in its loss and its gradients."""
        self._note("loss", "", loss)
        self._is_in_backward = True
        try:
            yield
        finally:
            self._is_in_backward = False
        self._micro_steps.append((self._labels, torch.stack(self._extremes)))
        self._labels, self._extremes = [], []

    def take(
        self, step: int, model: nn.Module, records: Mapping[str, RoutingRecords], norm: Tensor | None
    ) -> NonFinite | None:
        """What any rank found since the last call, and None if everything is finite; forgets it.

        records: this rank's of the whole step, in forward order. norm: of the reduced gradients, where it is known.
        Waits for the device once. Collective: every rank, with one number; with more where something was found.
        """
        parts = [extremes for _, extremes in self._micro_steps]
        parts += [pack(records)] if records else []
        parts += [] if norm is None else [norm]
        device = next(model.parameters()).device
        found = torch.zeros((), device=device)
        if parts:
            found = 1.0 - torch.stack([part.isfinite().all() for part in parts]).all().float()
        if dist.get_world_size() > 1:
            with communication():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if not bool(found):
            self.clear()
            return None
        own = (self._findings(records, norm), bad_weights(model))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        self.clear()
        return describe(step, [findings for findings, _ in everyone], [names for _, names in everyone])

    def clear(self) -> None:
        """Forget what was seen."""
        self._labels, self._extremes, self._micro_steps = [], [], []

    def _note_gradient(self, name: str, grad: Tensor) -> None:
        if self._is_in_backward:
            self._note("gradient", name, grad)

    def _note(self, kind: Kind, name: str, value: Tensor) -> None:
        extremes = least_and_greatest(value)
        if extremes:
            self._labels.append((kind, name))
            self._extremes += extremes

    def _findings(self, records: Mapping[str, RoutingRecords], norm: Tensor | None) -> list[Finding]:
        found = []
        for micro_step, (labels, extremes) in enumerate(self._micro_steps):
            for position, ((kind, name), pair) in enumerate(zip(labels, extremes.view(-1, 2).cpu(), strict=True)):
                if not bool(pair.isfinite().all()):
                    found.append(_finding(kind, name, pair, micro_step, position))
        last = max(len(self._micro_steps) - 1, 0)
        for position, (name, record) in enumerate(records.items()):
            numbers = pack({name: record})
            if not bool(numbers.isfinite().all()):
                found.append(_finding("records", name, numbers, last, position))
        if norm is not None and not bool(norm.isfinite()):
            found.append(_finding("norm", "", norm, last, 0))
        return found


@torch.no_grad()
def bad_weights(model: nn.Module) -> list[str]:
    """Names of the parameters of which this rank holds a value that is not finite. Waits for the device."""
    names: list[str] = []
    extremes: list[Tensor] = []
    for name, param in model.named_parameters():
        # At ZeRO-3 a parameter is empty between passes, and this rank's part of it is elsewhere.
        for held in (param.data, getattr(param, "ds_tensor", None)):
            if held is not None and (pair := least_and_greatest(held.data)):
                names.append(name)
                extremes += pair
    if not extremes:
        return []
    is_finite = torch.stack(extremes).view(-1, 2).isfinite().all(1).tolist()
    return list(dict.fromkeys(name for name, fine in zip(names, is_finite, strict=True) if not fine))


def describe(step: int, findings: Sequence[Sequence[Finding]], weights: Sequence[Sequence[str]]) -> NonFinite:
    """What the ranks found, in words. findings, weights: by rank; weights are names of `bad_weights`."""
    ranks_of: dict[tuple[Kind, str], list[int]] = {}
    everything = [(finding, rank) for rank, of_rank in enumerate(findings) for finding in of_rank]
    # The norm follows from any other, and is known at ZeRO-0 only.
    everything = [pair for pair in everything if pair[0].kind != "norm"] or everything
    everything.sort(key=lambda pair: (pair[0].time(), pair[1]))
    for finding, rank in everything:
        ranks = ranks_of.setdefault((finding.kind, finding.name), [])
        if rank not in ranks:
            ranks.append(rank)
    origin = everything[0][0]
    # Where a fault began: on the ranks that met it in the same micro step. On others it may have come from there.
    first = [rank for finding, rank in everything if _is_same(finding, origin)]
    value = "NaN" if origin.has_nan else "Infinity"
    place = _PLACES[origin.kind].format(origin.name)
    text = f"{value} in optimiser step {step}, on {_ranks(first)} of {len(findings)}: {place}."
    if rest := _rest(ranks_of, origin):
        text += f" Not finite as well: {'; '.join(rest)}."
    by_weight: dict[str, list[int]] = {}
    for rank, names in enumerate(weights):
        for name in names:
            by_weight.setdefault(name, []).append(rank)
    if by_weight:
        named = [f"{name} on {_ranks(ranks)}" for name, ranks in by_weight.items()]
        text += f" Weights hold NaN or infinity themselves: {_some(named, '; ')}."
    return NonFinite(text=text, bad_weights=tuple(by_weight))


def norm_is_not_finite(step: int) -> NonFinite:
    """Gradients that were finite on every rank, but whose norm is not."""
    finding = Finding(kind="norm", name="", has_nan=False, micro_step=0, position=0)
    return describe(step, [[finding]] * dist.get_world_size(), [])


def _rest(ranks_of: Mapping[tuple[Kind, str], list[int]], origin: Finding) -> list[str]:
    """Everything but the origin, a phrase per kind."""
    found = []
    for kind, words in _SEVERAL.items():
        ranks_by_name = {
            name: ranks
            for (of, name), ranks in ranks_of.items()
            if of == kind and (of, name) != (origin.kind, origin.name)
        }
        if ranks_by_name:
            ranks = {rank for ranks in ranks_by_name.values() for rank in ranks}
            found.append(f"{words.format(_some(list(ranks_by_name)))} on {_ranks(sorted(ranks))}")
    return found


def _finding(kind: Kind, name: str, values: Tensor, micro_step: int, position: int) -> Finding:
    has_nan = bool(values.isnan().any())
    return Finding(kind=kind, name=name, has_nan=has_nan, micro_step=micro_step, position=position)


def _is_same(finding: Finding, origin: Finding) -> bool:
    return (finding.kind, finding.name, finding.micro_step) == (origin.kind, origin.name, origin.micro_step)


def least_and_greatest(value: Tensor) -> list[Tensor]:
    """The least and the greatest value, 0-d, without waiting for the device; nothing of no values."""
    value = value.detach()
    if value.is_sparse:
        value = value.coalesce().values()
    return list(torch.aminmax(value)) if value.numel() > 0 else []


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _some(names: Sequence[str], separator: str = ", ", limit: int = 4) -> str:
    """All names, or the first few and how many more there are."""
    more = len(names) - limit
    return separator.join(names[:limit]) + (f"{separator}and {more} more" if more > 0 else "")
