"""Gradient clipping at ZeRO-0, where DeepSpeed 0.19.8 gets the norm of a model with experts wrong.

In float32 it averages the ranks' norms; in bfloat16 it leaves experts out. From ZeRO-1 on it is right.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynmoe_ds.distributed import communication
from dynmoe_ds.engine.seam import group_name
from dynmoe_ds.moe import MoELayer, is_shard

_SHARDS = "tensor-parallel shards"


@torch.no_grad()
def clip_gradients(
    model: nn.Module, layers: Iterable[MoELayer], max_norm: float, tp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Scale reduced gradients in place so that their global 2-norm is at most `max_norm` (0: only measure); the norm.

    Each expert counts once, whatever the layout, and so does each shard of a tensor-parallel parameter.
    Collective: every expert-parallel group, and the tensor-parallel group.
    """
    groups = {group_name(layer.ep_size): layer.ep_group for layer in layers} | {_SHARDS: tp_group}
    grads = [(_owner(p), p.grad) for p in model.parameters() if p.grad is not None]
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for name in (None, *sorted(groups)):
        own = [torch.linalg.vector_norm(grad, dtype=torch.float32) for owner, grad in grads if owner == name]
        square = torch.stack(own).square().sum() if own else torch.zeros((), device=device)
        if name is not None and groups[name] is not None:
            with communication(groups[name]):
                dist.all_reduce(square, group=groups[name])
        total += square
    norm = total.sqrt()
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for _, grad in grads:
            grad.mul_(scale)
    return norm


def _owner(param: nn.Parameter) -> str | None:
    """Whose group has the other parts of a parameter; None for one that every rank has whole."""
    return _SHARDS if is_shard(param) else getattr(param, "group_name", None)
