"""Tokens that several ranks hold alike, as those of a tensor-parallel group do: each rank routes its share of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dynmoe_ds.distributed import communication
from dynmoe_ds.errors import ConfigError


class TokenShares:
    """The shares of a group of neighbouring ranks with the same tokens, in the order of its ranks.

    With every token on one rank alone, none is computed or counted twice. What only some tokens have passed gets the
    gradients of these: `sum_gradients` adds the other ranks'.

    Raises: ConfigError for a group of other ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._handles: list[RemovableHandle] = []
        if fault := neighbours_fault("tp_group", dist.get_process_group_ranks(group)):
            raise ConfigError(fault)

    def take(self, hidden: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """This rank's share of hidden [T, D] and real [T], of ceil(T / size) tokens; padding fills up the last shares.

        Collective in the backward pass: the group.
        """
        missing = -len(hidden) % self.size
        if missing:
            if real is None:
                real = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            hidden, real = F.pad(hidden, (0, 0, 0, missing)), F.pad(real, (0, missing))
        mine: Tensor = _Take.apply(hidden, self)
        return mine, None if real is None else self.part(real)

    def join(self, own: Tensor, num_tokens: int) -> Tensor:
        """The output [T, D] of all tokens from this rank's share of it. Collective: the group."""
        everything: Tensor = _Join.apply(own, self)
        return everything[:num_tokens]

    def sum_gradients(self, module: nn.Module) -> None:
        """Sum every gradient of the module's parameters over the group, as soon as it is there.

        Once for parameters as they are now; again after they were replaced. Collective in each backward pass: the
        group. Raises: ConfigError for tensor-parallel parameters, whose module must see the tokens of all ranks.
        """
        if shards := [name for name, param in module.named_parameters() if is_shard(param)]:
            raise ConfigError(
                f"{', '.join(shards)} of a MoELayer with tp_group are tensor-parallel, but each rank of the group has "
                "its own share of the tokens there. Put a module that is not tensor-parallel into the layer."
            )
        for handle in self._handles:
            handle.remove()
        self._handles = [p.register_hook(self._sum) for p in module.parameters() if p.requires_grad]

    def part(self, values: Tensor) -> Tensor:
        """This rank's part of values [n, ...], with n a multiple of the size."""
        length = len(values) // self.size
        return values[self.rank * length : (self.rank + 1) * length]

    def whole(self, own: Tensor) -> Tensor:
        """The parts of all ranks. Collective: the group."""
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with communication(self.group):
            dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts)

    def _sum(self, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        with communication(self.group):
            dist.all_reduce(total, group=self.group)
        return total


def is_shard(param: nn.Parameter) -> bool:
    """Whether each rank of a tensor-parallel group holds another part of a parameter; DeepSpeed asks the same."""
    return bool(getattr(param, "model_parallel", False) or getattr(param, "tensor_model_parallel", False))


def neighbours_fault(what: str, ranks: list[int]) -> str | None:
    """What is wrong with a group that must be of neighbouring ranks: 0 … n-1, n … 2n-1 and so on."""
    first = ranks[0] // len(ranks) * len(ranks)
    expected = list(range(first, first + len(ranks)))
    if ranks == expected:
        return None
    return (
        f"{what} holds the ranks {ranks} but must be of neighbours, as {expected}, so that ranks with the same "
        "tokens come one after the other. Megatron's initialize_model_parallel makes them so."
    )


class _Take(torch.autograd.Function):
    """A share of what all ranks hold; its gradient on every rank is that of the whole."""

    @staticmethod
    def forward(ctx: Any, everything: Tensor, shares: TokenShares) -> Tensor:
        ctx.shares = shares
        return shares.part(everything).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.shares.whole(grads[0]), None


class _Join(torch.autograd.Function):
    """The whole on every rank, which all ranks use alike: a share's gradient is its part of the whole's."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shares: TokenShares) -> Tensor:
        ctx.shares = shares
        return shares.whole(own)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.shares.part(grads[0]).contiguous(), None
