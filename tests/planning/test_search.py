"""Which layouts are looked at, in which order, and that what is pasted is what was planned."""

from __future__ import annotations

import pytest

from dynmoe_ds.config.load import load_config
from dynmoe_ds.planning import Link, candidates, memory_per_rank, step_time, work_per_rank
from dynmoe_ds.planning.search import layouts
from tests.planning.examples import cluster, layout, shape

LINK = Link(bytes_per_s=1e5, latency_s=0.01)


def test_all_ways_to_use_the_ranks() -> None:
    found = list(layouts(shape(num_slots=12), cluster(), dtype="float32", chunks=2))
    assert {(plan.ep_size, plan.edp_size) for plan in found} == {(1, 4), (2, 2), (4, 1)}
    assert len(found) == 3 * 4 * 2 == len(set(found)), "EP x ZeRO x checkpointing"
    assert {plan.chunks for plan in found if plan.ep_size == 1} == {1}
    assert {plan.chunks for plan in found if plan.ep_size > 1} == {2}
    odd = layouts(shape(num_slots=6), cluster(), dtype="float32", chunks=1)
    assert {plan.ep_size for plan in odd} == {1, 2}, "4 does not divide 6 slots"


def test_over_nodes_rows_go_once_to_each_node_or_not() -> None:
    two = cluster(num_nodes=2, between_nodes=LINK)
    found = list(layouts(shape(num_slots=8), two, dtype="float32", chunks=1))
    assert {plan.by_node for plan in found if plan.ep_size <= 4} == {False}
    assert {plan.by_node for plan in found if plan.ep_size == 8} == {False, True}
    three = cluster(num_nodes=2, ranks_per_node=3, between_nodes=LINK)
    sizes = {plan.ep_size for plan in layouts(shape(num_slots=12), three, dtype="float32", chunks=1)}
    assert sizes == {1, 3, 6}, "2 ranks are neither whole nodes nor within one at all places"


def test_what_fits_comes_first_and_the_fastest_of_it() -> None:
    model = shape(dense_tensors=(40_000_000,))
    found = candidates(model, cluster(memory_per_rank_gib=1.0), dtype="float32", chunks=1)
    fitting = [candidate for candidate in found if candidate.fits]
    assert 0 < len(fitting) < len(found) and found[: len(fitting)] == fitting
    times = [candidate.time.total for candidate in fitting]
    assert times == sorted(times)
    for candidate in found:
        memory = memory_per_rank(model, candidate.layout, commits_on_touch=False)
        assert candidate.memory == memory and candidate.fits == (memory.total <= 1.0 * 2**30)
        seconds = step_time(work_per_rank(model, candidate.layout), candidate.layout, cluster()).total
        assert candidate.tokens_per_s * seconds == pytest.approx(4 * 100)


def test_the_overrides_give_the_layout_back() -> None:
    run = ["run_dir=runs/never-made-by-a-test", "parallel=two_nodes"]
    for plan in (
        layout(num_ranks=16, num_nodes=2, ep_size=16, by_node=True, zero_stage=3, checkpointing=True),
        layout(num_ranks=16, num_nodes=2, ep_size=8, zero_stage=2),
    ):
        parallel = load_config([*run, *plan.overrides(8).split()]).parallel
        assert (parallel.num_ranks, parallel.ep_size, parallel.zero_stage) == (16, plan.ep_size, plan.zero_stage)
        assert parallel.activation_checkpointing == ("torch" if plan.checkpointing else "none")
        assert parallel.dispatch.ranks_per_node == (8 if plan.by_node else None)
    assert "dispatch" not in layout().overrides(None)
    assert layout(num_nodes=2, by_node=True).overrides(None).endswith(" parallel.dispatch.ranks_per_node=2")
