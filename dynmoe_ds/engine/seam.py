"""The seam: everything that DeepSpeed's engine looks for in a model with expert-parallel parameters.

Written against DeepSpeed 0.19.8, whose names below are internal: the version is pinned to 0.19, and an equivalence test
per ZeRO stage (tests/engine/test_equivalence.py) fails if one of them changes its meaning.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from dynmoe_ds.distributed import attempt_together, current_layout, group_timeout
from dynmoe_ds.engine.tensor_parallel import check_expert_groups
from dynmoe_ds.engine.timed_collectives import time_collectives
from dynmoe_ds.moe import MoELayer

_MARKER = "_deepspeed_marker"


class _ExpertMarker(MoE):
    """A child without parameters that tells DeepSpeed at ZeRO 0, 1 and 2 that the model has experts.

    The engine asks `isinstance(module, MoE)` and nothing else. The layer itself must not be one, or DeepSpeed's
    per-expert checkpoint files would touch its state.
    """

    def __init__(self, num_experts: int, group_name: str) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.num_local_experts, self.expert_group_name = num_experts, 0, group_name

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine; the groups exist already."""


def init_distributed(timeout_s: float) -> None:
    """Initialise torch.distributed through DeepSpeed unless it is: NCCL on GPUs, gloo on CPUs.

    Collective: every rank. timeout_s: after how long a rank stops waiting for another one.
    """
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce here: 46 s, and a killed build leaves a lock on which
        # every later run hangs. No setting turns it off.
        deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
    if get_accelerator().device_name() != "cpu":
        # Collectives on objects use the current device, and DeepSpeed sets it only while it builds its engine.
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized() and "RANK" not in os.environ:
        # Started without a launcher: one rank. DeepSpeed would ask MPI, which needs mpi4py.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), auto_mpi_discovery=False, verbose=False)
    time_collectives(deepspeed.comm.comm.cdb)
    # DeepSpeed makes its groups, those of the experts too, without a timeout. What fails if this name changes is
    # tests/engine/test_dead_rank.py.
    deepspeed.comm.comm.cdb.new_group = lambda ranks: dist.new_group(ranks, timeout=group_timeout())


def runs_on_gpu() -> bool:
    """Whether DeepSpeed trains on GPUs in this process."""
    return bool(get_accelerator().device_name() != "cpu")


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def attach(layers: Iterable[MoELayer], zero_stage: int, mpu: Any = None) -> None:
    """Give each layer its process groups and its parameters the marks that ZeRO needs.

    mpu: as for `deepspeed.initialize`. Collective: every rank. Raises: ConfigError where others have made groups of
    another layout.
    """
    for layer in layers:
        name = group_name(layer.ep_size)
        if name not in groups._get_expert_parallel_group_dict():
            if mpu is None:
                groups._create_expert_and_data_parallel(layer.ep_size)
            else:
                groups._create_expert_data_and_model_parallel(layer.ep_size, mpu)
        ep_group, edp_group = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
        layout = current_layout(layer.ep_size, layer.tp_size)
        attempt_together(partial(check_expert_groups, layout, ep_group, edp_group))
        layer.sum_gradients()  # of new parameters, where a pool has changed its size
        layer.ep_group = ep_group if layer.ep_size > 1 else None
        if layer.ep_size > 1:
            layer.dispatch_groups()  # made now, while all ranks are here
        ep_rank = dist.get_rank(ep_group)
        assert layer.local_slots.start == ep_rank * len(layer.local_slots), (layer.local_slots, ep_rank)
        for param in layer.experts.parameters():
            # DeepSpeed: averaged over the expert-data-parallel group, not over all ranks; also with ep_size 1.
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = name  # type: ignore[attr-defined]
            if zero_stage == 3:
                # Without these three ZeRO-3 splits experts over all ranks and trains silently wrong.
                param.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                param.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
                param.ds_zero_partition_process_group = edp_group  # type: ignore[attr-defined]
        if zero_stage < 3:
            setattr(layer, _MARKER, _ExpertMarker(layer.num_slots, name))
        elif hasattr(layer, _MARKER):
            delattr(layer, _MARKER)


def check_partitioning(layers: Iterable[MoELayer]) -> None:
    """At ZeRO-3, make sure that experts are split over their replicas only: else they train silently wrong."""
    for layer in layers:
        expected = dist.get_process_group_ranks(expert_data_parallel_group(layer.ep_size))
        for param in layer.experts.parameters():
            actual = dist.get_process_group_ranks(param.ds_process_group)  # type: ignore[attr-defined]
            assert actual == expected, f"{layer.name}: experts are split over ranks {actual}, not {expected}"


def split_expert_groups(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Optimiser groups with the experts of each in a group of their own, as ZeRO 0, 1 and 2 want them."""
    named = [{"name": f"group_{i}", **group} for i, group in enumerate(param_groups)]
    return split_params_into_different_moe_groups_for_optimizer(named)


def group_name(ep_size: int) -> str:
    """DeepSpeed's name for the process groups of an expert-parallel size."""
    return f"ep_size_{ep_size}"


def expert_data_parallel_group(ep_size: int) -> dist.ProcessGroup:
    """The ranks that hold the same slots as this one."""
    return groups._get_expert_data_parallel_group(group_name(ep_size))


def sharing_group(param: torch.nn.Parameter) -> dist.ProcessGroup:
    """The ranks among which ZeRO splits a parameter's optimiser state: its replicas."""
    if getattr(param, "allreduce", True):
        return groups._get_sequence_data_parallel_group()
    return groups._get_expert_data_parallel_group(param.group_name)  # type: ignore[attr-defined]
