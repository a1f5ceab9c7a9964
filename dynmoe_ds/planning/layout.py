"""How ranks are used: the part of a run's configuration that changes its cost and not its result."""

from __future__ import annotations

from dataclasses import dataclass

from dynmoe_ds.planning.cluster import DType


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """num_ranks = EP x EDP.

    num_nodes: neighbouring ranks fill a node, and nodes are equal. checkpointing: whether each layer's activations are
    computed again in the backward pass. chunks, by_node: as `DispatchConfig`'s chunks and a `ranks_per_node` that is
    the node's size.
    """

    num_ranks: int
    num_nodes: int
    ep_size: int
    zero_stage: int
    dtype: DType
    checkpointing: bool
    chunks: int
    by_node: bool

    @property
    def edp_size(self) -> int:
        """Replicas of each expert."""
        return self.num_ranks // self.ep_size

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def ep_spans_nodes(self) -> bool:
        """Whether an expert-parallel group, which neighbouring ranks form, has ranks on several nodes."""
        return self.ep_size > self.ranks_per_node

    def overrides(self, dispatch_ranks_per_node: int | None) -> str:
        """What to give `dynmoe train` for this layout, where the configuration's node size is as given."""
        values: dict[str, object] = {
            "num_ranks": self.num_ranks,
            "ep_size": self.ep_size,
            "zero_stage": self.zero_stage,
            "activation_checkpointing": "torch" if self.checkpointing else "none",
        }
        wanted = self.ranks_per_node if self.by_node else None
        if wanted != dispatch_ranks_per_node:
            values["dispatch.ranks_per_node"] = "null" if wanted is None else wanted
        return " ".join(f"parallel.{name}={value}" for name, value in values.items())
