"""How rows travel between the ranks of an expert-parallel group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """What a layer with `ep_size` above 1 does besides sending each token once to every rank that it needs.

    chunks: parts that a rank's tokens are split into, so that rows of one travel while experts compute another's.
    Results are equal to rounding; more than one pays where the links are slow and the parts still fill the device.
    ranks_per_node: ranks that share a fast link. Where an expert-parallel group spans several such nodes, a token goes
    once to each node that it needs, and from there to the node's ranks. None: all links are alike.
    """

    chunks: int = 1
    ranks_per_node: int | None = None

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
        per_node = self.ranks_per_node
        if not found and per_node is not None and ep_size % per_node and per_node % ep_size:
            found.append(
                f"dispatch.ranks_per_node is {per_node} and ep_size {ep_size}, but one must divide the other, so that "
                "an expert-parallel group has whole nodes or lies within one."
            )
        return found
