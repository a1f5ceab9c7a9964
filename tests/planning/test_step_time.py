"""The time of a step, worked out by hand."""

from __future__ import annotations

import pytest

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.planning import Link, Work, step_time
from dynmoe_ds.planning.cluster import FlopRates
from dynmoe_ds.planning.work import Sent
from tests.planning.examples import cluster, layout

WORK = Work(
    dense_flops=3e6, expert_flops=4e6, router_entries=5e4, memory_bytes=2e7, layer_passes=6, slot_passes=10,
    micro_steps=2, tensors=5, fetches=40, optimizer_bytes=4e6, dispatch=Sent(bytes_within=8e6, collectives_within=100),
    synchronisation=Sent(bytes_within=1e6, collectives_within=2),
)  # fmt: skip


def test_every_term() -> None:
    """Products 1e6 and 2e6, memory 1e7, update 1e6, entries 1e5, link 1e6 + 3 ms; fixed 10, 1, 100, 2, 0.5 ms."""
    time = step_time(WORK, layout(), cluster())
    assert (time.dense, time.experts, time.elementwise, time.router) == (3.0, 2.0, 2.0, 0.5)
    assert time.fixed == pytest.approx(6 * 0.01 + 10 * 0.001 + 2 * 0.1 + 5 * 0.002 + 40 * 0.0005)
    assert (time.dispatch, time.synchronisation, time.optimizer) == pytest.approx((8.3, 1.006, 4.0))
    assert time.total == pytest.approx(3 + 2 + 2 + 0.5 + 0.3 + 8.3 + 1.006 + 4)
    assert list(time.terms())[:3] == ["dispatch", "optimizer", "dense"]


def test_chunks_hide_the_shorter_behind_the_longer() -> None:
    """Experts 2 s beside dispatch 8.3 s: in 4 chunks 3/4 of 2 s, of which the devices can do half."""
    assert step_time(WORK, layout(chunks=4), cluster()).dispatch == pytest.approx(8.3 - 1.5)
    assert step_time(WORK, layout(chunks=4), cluster(overlap=0.5)).dispatch == pytest.approx(8.3 - 0.75)


def test_ranks_that_share_processors_take_longer_by_as_much() -> None:
    alone = step_time(WORK, layout(), cluster())
    shared = step_time(WORK, layout(), cluster(ranks_per_node=8, processors_per_node=2))
    assert shared.total == pytest.approx(4 * alone.total)
    assert step_time(WORK, layout(), cluster(processors_per_node=100)) == alone


def test_a_rate_of_null_costs_nothing() -> None:
    free = cluster(memory_bytes_per_s=None, within_node=Link(bytes_per_s=None, latency_s=0.003))
    time = step_time(WORK, layout(), free)
    assert (time.elementwise, time.dispatch) == (0.0, pytest.approx(0.3))


def test_links_between_nodes_have_their_own_rate() -> None:
    link = Link(bytes_per_s=1e5, latency_s=0.5)
    work = Work(**{name: getattr(WORK, name) for name in Work.__dataclass_fields__} | {
        "dispatch": Sent(bytes_within=1e6, bytes_between=1e6, collectives_within=1, collectives_between=2)
    })  # fmt: skip
    time = step_time(work, layout(num_nodes=2), cluster(num_nodes=2, between_nodes=link))
    assert time.dispatch == pytest.approx(1 + 0.003 + 10 + 1.0)


def test_a_dtype_without_rates_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        step_time(WORK, layout(dtype="bfloat16"), cluster())
    assert str(error.value) == (
        "parallel.dtype is bfloat16 but the cluster's rates are known in float32 only. Use parallel.dtype=float32, or "
        "another cluster."
    )
    both = cluster(bfloat16=FlopRates(dense=6e6, experts=None))
    assert step_time(WORK, layout(dtype="bfloat16"), both).dense == 0.5
