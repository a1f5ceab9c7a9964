"""What a cluster can do, in the few numbers that the time of a step depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from dynmoe_ds.config.bounds import at_least

DType = Literal["float32", "bfloat16"]
BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What one rank sends to others. bytes_per_s: None for a cost too small to be seen. latency_s: per collective."""

    bytes_per_s: float | None
    latency_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopRates:
    """Effective floating-point operations per second of a rank, in the model's own matrix products and in experts'."""

    dense: float | None
    experts: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutError:
    """How far predictions were from measurements that the fit had not seen; errors as |predicted / measured − 1|.

    time_ratios, memory_ratios: the least and the greatest predicted / measured.
    """

    num_layouts: int
    median_time_error: float
    worst_time_error: float
    median_memory_error: float
    worst_memory_error: float
    time_ratios: tuple[float, ...]
    memory_ratios: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A cluster of equal nodes, as `configs/cluster/*.yaml` describe it.

    A rate of null is one whose cost was too small to be seen and counts as nothing.

    source: where the numbers come from. processors_per_node: ranks that a node runs at full speed; where there are
    more, as with processes on few cores, everything takes that many times longer. memory_per_rank_gib: what a rank may
    use. commits_on_touch: whether memory that is reserved and not written costs nothing, as on a CPU. overlap: how much
    of the shorter of transfers and expert computation can hide behind the longer where rows travel in chunks, 0 to 1.

    float32, bfloat16: rates of matrix products; null where the type was not measured. memory_bytes_per_s: of reading
    and writing rows and activations. optimizer_bytes_per_s: of reading and writing optimiser state.
    router_entries_per_s: pairs of token and slot that a router scores and plans. layer_s, slot_s, micro_step_s,
    tensor_s, fetch_s: fixed costs of a layer and of a slot per pass forwards or backwards, of a micro step, of a
    parameter tensor per optimiser step, and of one that ZeRO-3 hands to a layer and takes back, per micro step.
    within_node, between_nodes: links; null for nodes that have none between them.
    held_out: null where nothing was measured.
    """

    source: str
    num_nodes: int
    ranks_per_node: int
    processors_per_node: int
    memory_per_rank_gib: float
    commits_on_touch: bool
    overlap: float
    float32: FlopRates | None
    bfloat16: FlopRates | None
    memory_bytes_per_s: float | None
    optimizer_bytes_per_s: float | None
    router_entries_per_s: float | None
    layer_s: float
    slot_s: float
    micro_step_s: float
    tensor_s: float
    fetch_s: float
    within_node: Link
    between_nodes: Link | None
    held_out: HeldOutError | None

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def memory_bytes(self) -> float:
        """Per rank."""
        return self.memory_per_rank_gib * 2**30

    @property
    def slowdown(self) -> float:
        """How many ranks share a processor."""
        return max(1.0, self.ranks_per_node / self.processors_per_node)

    def rates(self, dtype: DType) -> FlopRates | None:
        return self.float32 if dtype == "float32" else self.bfloat16

    def faults(self) -> list[str]:
        """One sentence per value that cannot work."""
        return list(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from at_least("cluster", self, 1, "num_nodes", "ranks_per_node", "processors_per_node")
        if not self.memory_per_rank_gib > 0:
            yield f"cluster.memory_per_rank_gib is {self.memory_per_rank_gib} but must be above 0."
        if not 0 <= self.overlap <= 1:
            yield f"cluster.overlap is {self.overlap} but must be between 0 and 1."
        yield from _rate_faults("cluster", self)
        for name in ("float32", "bfloat16", "within_node", "between_nodes"):
            part = getattr(self, name)
            if part is not None:
                yield from _rate_faults(f"cluster.{name}", part)
        if self.num_nodes > 1 and self.between_nodes is None:
            yield (
                f"cluster.num_nodes is {self.num_nodes} but cluster.between_nodes is null, so nothing is known of the "
                "link between nodes. Use one node, or another cluster."
            )
        if self.float32 is None and self.bfloat16 is None:
            yield "cluster.float32 and cluster.bfloat16 are both null. Give the rates of one."


def _rate_faults(path: str, part: object) -> Iterator[str]:
    """Rates must be above 0 and fixed costs not below."""
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if field.name.endswith("_s") and not field.name.endswith("per_s"):
            if value < 0:
                yield f"{path}.{field.name} is {value} but must not be negative."
        elif (field.name.endswith("per_s") or isinstance(part, FlopRates)) and value is not None and not value > 0:
            yield f"{path}.{field.name} is {value} but must be above 0, or null for a cost that cannot be seen."
