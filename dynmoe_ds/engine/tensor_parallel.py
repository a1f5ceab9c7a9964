"""Tensor parallelism beside expert parallelism: what DeepSpeed must be told of it, and what would train silently wrong.

Of the layouts that DeepSpeed can make of them, only lanes are right (`distributed.Layout`): where experts are shared by
the ranks of a tensor-parallel group, or their replicas are counted across it, updates are doubled or ZeRO-1 and 2
clip by a wrong norm, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dynmoe_ds.distributed import Layout, raise_together
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.moe import MoELayer, is_shard, neighbours_fault


def tp_size_of(mpu: Any) -> int:
    """How many ranks hold the same tokens. mpu: as for `deepspeed.initialize`, or None."""
    return 1 if mpu is None else int(mpu.get_model_parallel_world_size())


def tensor_parallel_faults(mpu: Any, layers: Mapping[str, MoELayer]) -> list[str]:
    """What is wrong with the groups of `mpu`, and with layers that were built for others."""
    tp_size, world_size, rank = tp_size_of(mpu), dist.get_world_size(), dist.get_rank()
    if mpu is not None:
        tp_ranks = dist.get_process_group_ranks(mpu.get_model_parallel_group())
        dp_ranks = dist.get_process_group_ranks(mpu.get_data_parallel_group())
        if fault := neighbours_fault("The model-parallel group of mpu", tp_ranks):
            return [fault]
        if dp_ranks != (lane := list(range(rank % tp_size, world_size, tp_size))):
            return [
                f"The data-parallel group of mpu holds the ranks {dp_ranks} but must be {lane}: all ranks at one place "
                "of their tensor-parallel groups. Pipeline and context parallelism do not work with experts."
            ]
    found = []
    for name, layer in layers.items():
        if layer.tp_size != tp_size:
            given = "no mpu" if mpu is None else f"an mpu with tensor-parallel groups of {tp_size}"
            found.append(
                f"{name}: the layer was built for tensor-parallel groups of {layer.tp_size} ranks, but initialize was "
                f"given {given}: experts would see every token several times. Give the layer tp_group="
                "mpu.get_model_parallel_group(), and initialize the mpu."
            )
    return found


def check_expert_groups(layout: Layout, ep_group: dist.ProcessGroup, edp_group: dist.ProcessGroup) -> None:
    """Raises: ConfigError where DeepSpeed's groups, which others may have made, are not those of the layout."""
    found = dist.get_process_group_ranks(ep_group), dist.get_process_group_ranks(edp_group)
    expected = layout.ep_group(), layout.expert_data_parallel_group()
    if found != expected:
        raise ConfigError(
            f"DeepSpeed has groups for ep_size {layout.ep_size} already: rank {layout.rank} shares experts with the "
            f"ranks {found[0]}, and has its replicas on {found[1]}. With tensor-parallel groups of {layout.tp_size} "
            f"they must be {expected[0]} and {expected[1]}, or gradients and their norm are silently wrong. Let "
            "dynmoe_ds.initialize make them, and use one layout per process."
        )


@torch.no_grad()
def agree_on_replicas(model: nn.Module, layers: Mapping[str, MoELayer], tp_group: dist.ProcessGroup) -> None:
    """Make layers equal over a tensor-parallel group, and make sure that all other parameters are that are not shards.

    Layers may have drawn their weights from generators that differ, as Megatron's do on purpose.

    Collective: every rank. Raises: ConfigError for a parameter that differs and is not marked as a shard, and a
    DivergenceError that quotes it on the ranks of other groups.
    """
    source = dist.get_process_group_ranks(tp_group)[0]
    for layer in layers.values():
        for tensor in (*layer.parameters(), *layer.buffers()):
            dist.broadcast(tensor.data, src=source, group=tp_group)
    names = [name for name, param in model.named_parameters() if not is_shard(param)]
    params = dict(model.named_parameters())
    sums = [torch.stack([params[name].double().sum(), params[name].double().abs().sum()]) for name in names]
    own = torch.stack(sums) if sums else torch.zeros(0, 2)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(everyone, own, group=tp_group)
    differs = (torch.stack(everyone) != everyone[0]).any(dim=2).any(dim=0).tolist()
    error: ConfigError | None = None
    if odd := [name for name, is_odd in zip(names, differs, strict=True) if is_odd]:
        error = ConfigError(
            f"{', '.join(odd[:5])}{' and others' if len(odd) > 5 else ''} differ between ranks with the same tokens. "
            "Set param.tensor_model_parallel = True on a shard, as Megatron's layers do, and give all other parameters "
            "the same initial values, or the norm of the gradients is silently wrong."
        )
    raise_together(error)
