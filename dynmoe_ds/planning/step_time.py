"""How long one optimiser step takes on a cluster: what a rank does, over what it can do."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.planning.cluster import Cluster, Link
from dynmoe_ds.planning.layout import Layout
from dynmoe_ds.planning.work import Sent, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one optimiser step by what takes them.

    dense, experts: matrix products. elementwise: rows and activations that are read and written beside them. router:
    scores and plans. fixed: what does not grow with sizes. dispatch: rows between ranks, as far as nothing hides them.
    synchronisation: gradients and weights between ranks. optimizer: the update.
    """

    dense: float
    experts: float
    elementwise: float
    router: float
    fixed: float
    dispatch: float
    synchronisation: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def terms(self) -> dict[str, float]:
        """By name, the longest first."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def step_time(work: Work, layout: Layout, cluster: Cluster) -> StepTime:
    """The time of `work`: each count over its rate, all of it longer by what ranks share processors.

    In c chunks the shorter of dispatch and expert computation hides behind the longer but for a share 1/c, since the
    first chunk's rows must arrive before, and the last one's leave after; `cluster.overlap` says how much of that the
    devices can do.

    Raises: ConfigError for a dtype that the cluster has no rates for.
    """
    rates = cluster.rates(layout.dtype)
    if rates is None:
        other = "bfloat16" if layout.dtype == "float32" else "float32"
        raise ConfigError(
            f"parallel.dtype is {layout.dtype} but the cluster's rates are known in {other} only. Use "
            f"parallel.dtype={other}, or another cluster."
        )
    slowdown = cluster.slowdown
    experts = over(work.expert_flops, rates.experts)
    dispatch = transfer_time(work.dispatch, cluster)
    hidden = cluster.overlap * min(experts, dispatch) * (1 - 1 / layout.chunks)
    fixed = (
        work.layer_passes * cluster.layer_s
        + work.slot_passes * cluster.slot_s
        + work.micro_steps * cluster.micro_step_s
        + work.tensors * cluster.tensor_s
        + work.fetches * cluster.fetch_s
    )
    return StepTime(
        dense=slowdown * over(work.dense_flops, rates.dense),
        experts=slowdown * experts,
        elementwise=slowdown * over(work.memory_bytes, cluster.memory_bytes_per_s),
        router=slowdown * over(work.router_entries, cluster.router_entries_per_s),
        fixed=slowdown * fixed,
        dispatch=slowdown * (dispatch - hidden),
        synchronisation=slowdown * transfer_time(work.synchronisation, cluster),
        optimizer=slowdown * over(work.optimizer_bytes, cluster.optimizer_bytes_per_s),
    )


def transfer_time(sent: Sent, cluster: Cluster) -> float:
    """Bytes over bandwidth plus latency per collective, over each kind of link."""
    total = _over_link(sent.bytes_within, sent.collectives_within, cluster.within_node)
    if sent.bytes_between or sent.collectives_between:
        assert cluster.between_nodes is not None, "checked with the cluster"
        total += _over_link(sent.bytes_between, sent.collectives_between, cluster.between_nodes)
    return total


def over(amount: float, rate: float | None) -> float:
    """Seconds of an amount at a rate per second; None is a rate whose cost cannot be seen."""
    return 0.0 if rate is None else amount / rate


def _over_link(num_bytes: float, collectives: float, link: Link) -> float:
    return over(num_bytes, link.bytes_per_s) + collectives * link.latency_s
