"""A bounded sample of the tokens that layers see, for what an adaptation wants to know of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.distributed import communication

if TYPE_CHECKING:
    from dynmoe_ds.moe.layer import MoELayer
    from dynmoe_ds.moe.placement import Placement

_GOLDEN_RATIO = (1 + 5**0.5) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """hidden [n, D], mask [n, S] bool, priority [n] float64: least first to keep, infinite for padding."""

    hidden: Tensor
    mask: Tensor
    priority: Tensor

    def least(self, size: int) -> _Kept:
        index = self.priority.topk(min(size, self.priority.numel()), largest=False).indices
        return _Kept(hidden=self.hidden[index], mask=self.mask[index], priority=self.priority[index])

    def __add__(self, other: _Kept) -> _Kept:
        return _Kept(
            hidden=torch.cat([self.hidden, other.hidden]),
            mask=torch.cat([self.mask, other.mask]),
            priority=torch.cat([self.priority, other.priority]),
        )


class TokenSampler:
    """Keeps up to `size` hidden vectors per layer with the slots they went to, on every rank.

    Which ones is a function of their number and order alone: the j-th token has priority frac(j φ), which spreads the
    kept ones evenly over all micro steps and positions. Adding never waits for the device.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[MoELayer, _Kept] = {}
        self._num_seen: dict[MoELayer, int] = {}

    def add(self, layer: MoELayer, hidden: Tensor, mask: Tensor, real: Tensor | None) -> None:
        """Take in hidden [T, D] that went to mask [T, S] bool; `real` [T] bool is False for padding."""
        first, num_tokens = self._num_seen.get(layer, 0), hidden.shape[0]
        self._num_seen[layer] = first + num_tokens
        number = torch.arange(first, first + num_tokens, dtype=torch.float64, device=hidden.device)
        priority = (number * _GOLDEN_RATIO).frac()
        if real is not None:
            priority = priority.masked_fill(~real, torch.inf)
        new = _Kept(hidden=hidden.detach(), mask=mask, priority=priority).least(self.size)
        self._kept[layer] = (self._kept[layer] + new).least(self.size) if layer in self._kept else new

    def renumber(self, layer: MoELayer, old: Placement) -> None:
        """Let the tokens of `layer` be in the slots of its placement, where their experts were under `old`."""
        if layer in self._kept:
            new, kept = layer.placement, self._kept[layer]
            ids = [id_ for id_ in old.live_ids if id_ in new.slots_by_id]
            mask = kept.mask.new_zeros(len(kept.mask), new.num_slots)
            mask[:, [new.slot_of(id_) for id_ in ids]] = kept.mask[:, [old.slot_of(id_) for id_ in ids]]
            self._kept[layer] = replace(kept, mask=mask)

    def gather(self, layer: MoELayer) -> tuple[Tensor, Tensor]:
        """The sample of all ranks: hidden [N, D] float32 and mask [N, S] bool, equal everywhere. N may be 0.

        Tokens with a value that is not finite are left out. Collective: every rank.
        """
        width, num_slots = layer.hidden_size, layer.num_slots
        # A row of numbers per token, so that there is one collective: hidden vector, mask, whether it is a token.
        own = torch.zeros(self.size, width + num_slots + 1, device=layer.active.device)
        if layer in self._kept:
            kept = self._kept[layer]
            parts = (kept.hidden, kept.mask, kept.priority.isfinite()[:, None])
            own[: len(kept.priority)] = torch.cat([part.float() for part in parts], dim=1)
        rows = [own]
        if dist.is_initialized() and dist.get_world_size() > 1:
            rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            with communication():
                dist.all_gather(rows, own)
        everything = torch.cat(rows)
        everything = everything[(everything[:, -1] > 0) & everything.isfinite().all(1)]
        return everything[:, :width], everything[:, width:-1] > 0

    def clear(self) -> None:
        """Forget all tokens."""
        self._kept.clear()
        self._num_seen.clear()
