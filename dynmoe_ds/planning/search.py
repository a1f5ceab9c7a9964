"""All layouts of a model on a cluster, with what each would cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynmoe_ds.planning.cluster import Cluster, DType
from dynmoe_ds.planning.layout import Layout
from dynmoe_ds.planning.memory import Memory, memory_per_rank
from dynmoe_ds.planning.model_shape import ModelShape
from dynmoe_ds.planning.step_time import StepTime, step_time
from dynmoe_ds.planning.work import work_per_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout and its cost. fits: whether `memory.total` is within the cluster's limit."""

    layout: Layout
    time: StepTime
    memory: Memory
    fits: bool
    tokens_per_s: float


def candidates(model: ModelShape, cluster: Cluster, *, dtype: DType, chunks: int) -> list[Candidate]:
    """Every EP size x ZeRO stage x checkpointing x way between nodes on all ranks of the cluster.

    Those that fit come first, the fastest first, and of equally fast ones the smallest.

    Raises: ConfigError for a dtype that the cluster has no rates for.
    """
    found = []
    for layout in layouts(model, cluster, dtype=dtype, chunks=chunks):
        time = step_time(work_per_rank(model, layout), layout, cluster)
        memory = memory_per_rank(model, layout, commits_on_touch=cluster.commits_on_touch)
        tokens = model.tokens * model.accumulation_steps * layout.num_ranks
        found.append(
            Candidate(
                layout=layout,
                time=time,
                memory=memory,
                fits=memory.total <= cluster.memory_bytes,
                tokens_per_s=tokens / time.total,
            )
        )
    return sorted(found, key=lambda candidate: (not candidate.fits, candidate.time.total, candidate.memory.total))


def layouts(model: ModelShape, cluster: Cluster, *, dtype: DType, chunks: int) -> Iterator[Layout]:
    """EP sizes that divide the ranks and the slots, and have whole nodes or lie within one."""
    num_ranks, per_node = cluster.num_ranks, cluster.ranks_per_node
    for ep_size in range(1, num_ranks + 1):
        if num_ranks % ep_size or model.num_slots % ep_size or (ep_size % per_node and per_node % ep_size):
            continue
        ways = (False, True) if ep_size > per_node > 1 else (False,)
        for zero_stage in range(4):
            for checkpointing in (False, True):
                for by_node in ways:
                    yield Layout(
                        num_ranks=num_ranks,
                        num_nodes=cluster.num_nodes,
                        ep_size=ep_size,
                        zero_stage=zero_stage,
                        dtype=dtype,
                        checkpointing=checkpointing,
                        chunks=chunks if ep_size > 1 else 1,
                        by_node=by_node,
                    )
