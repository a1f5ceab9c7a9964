"""How rows travel between the ranks of an expert-parallel group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """What a layer with `ep_size` above 1 does besides sending each token once to every rank that it needs.

    chunks: parts that a rank's tokens are split into, so that rows of one travel while experts compute another's.
    Results are equal to rounding; more than one pays where the links are slow and the parts still fill the device. With
    ep_size 1 nothing travels, and it changes nothing.
    ranks_per_node: ranks that share a fast link. Where an expert-parallel group spans several such nodes, a token goes
    once to each node that it needs, and from there to the node's ranks. None: all links are alike.
    static_shapes: only with ep_size 1: room for the most rows that the router can choose, T times `most_experts` of its
    configuration, so that all shapes are those of the last call. On a GPU that Triton's kernels run on (float32 or 16
    bits; NVIDIA from compute capability 8.0, AMD) the layer itself then never waits for the device, as a CUDA graph
    wants; where torch multiplies in their place, each product may wait. It costs memory, and a GPU no products, for
    rows that are not there.
    """

    chunks: int = 1
    ranks_per_node: int | None = None
    static_shapes: bool = False

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        values = {"chunks": self.chunks, "ranks_per_node": self.ranks_per_node}
        return [
            f"dispatch.{name} is {value} but must be at least 1."
            for name, value in values.items()
            if value is not None and value < 1
        ]

    def faults_with(self, ep_size: int) -> list[str]:
        """As `faults`, for an expert-parallel group of `ep_size` ranks."""
        found = self.faults()
        if self.static_shapes and ep_size > 1:
            found.append(
                f"dispatch.static_shapes is true and ep_size {ep_size}, but how many rows other ranks send is never "
                "known beforehand. Use it with ep_size 1."
            )
        per_node = self.ranks_per_node
        if not self.faults() and per_node is not None and ep_size % per_node and per_node % ep_size:
            found.append(
                f"dispatch.ranks_per_node is {per_node} and ep_size {ep_size}, but one must divide the other, so that "
                "an expert-parallel group has whole nodes or lies within one."
            )
        return found
