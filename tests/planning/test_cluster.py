"""Descriptions of clusters: the committed ones, overrides, and every fault by its message."""

from __future__ import annotations

from typing import Any

import pytest

from dynmoe_ds.config.groups import cluster_names, config_groups
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.planning import Link
from dynmoe_ds.planning.cluster import FlopRates
from dynmoe_ds.planning.load_cluster import load_cluster
from tests.planning.examples import cluster


def test_the_committed_clusters() -> None:
    assert set(cluster_names()) == {"h100_nodes", "local_cpu"}
    assert "cluster" not in config_groups(), "a run has none"
    local, h100 = load_cluster("local_cpu", []), load_cluster("h100_nodes", [])
    assert local.held_out is not None and "python -m benchmarks.scale" in local.source
    assert h100.held_out is None and h100.source.startswith("not measured")
    # What an option is for: both values are there.
    assert (local.commits_on_touch, h100.commits_on_touch) == (True, False)
    assert (local.overlap, h100.overlap) == (0.0, 1.0)
    assert local.bfloat16 is None and h100.bfloat16 is not None
    assert h100.num_ranks == 8 and load_cluster("h100_nodes", [("num_nodes", 3)]).num_ranks == 24


def test_overrides_reach_sections_that_the_file_does_not_know() -> None:
    values = [("num_nodes", 2), ("between_nodes.bytes_per_s", 1000000), ("between_nodes.latency_s", 0.001)]
    found = load_cluster("local_cpu", values)
    assert found.between_nodes == Link(bytes_per_s=1e6, latency_s=0.001)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "local_cqu",
            [],
            "There is no option cluster=local_cqu. Did you mean 'local_cpu'? Options: h100_nodes, local_cpu.",
        ),
        ("local_cpu", [("num_node", 2)], "There is no key 'cluster.num_node'. Did you mean 'cluster.num_nodes'?"),
        ("local_cpu", [("num_nodes", "two")], "cluster.num_nodes is 'two' (text) but must be a whole number."),
        ("local_cpu", [("num_nodes.x", 2)], "cluster.num_nodes.x cannot be set: cluster.num_nodes is not a section."),
        (
            "local_cpu",
            [("num_nodes", 2)],
            "cluster.num_nodes is 2 but cluster.between_nodes is null, so nothing is known of the link between nodes. "
            "Use one node, or another cluster.",
        ),
    ],
)  # fmt: skip
def test_faults_of_the_description(name: str, values: list[tuple[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_cluster(name, values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks_per_node": 0}, "cluster.ranks_per_node is 0 but must be at least 1."),
        ({"memory_per_rank_gib": 0.0}, "cluster.memory_per_rank_gib is 0.0 but must be above 0."),
        ({"overlap": 1.5}, "cluster.overlap is 1.5 but must be between 0 and 1."),
        ({"layer_s": -1.0}, "cluster.layer_s is -1.0 but must not be negative."),
        (
            {"memory_bytes_per_s": 0.0},
            "cluster.memory_bytes_per_s is 0.0 but must be above 0, or null for a cost that cannot be seen.",
        ),
        (
            {"float32": FlopRates(dense=-1.0, experts=None)},
            "cluster.float32.dense is -1.0 but must be above 0, or null for a cost that cannot be seen.",
        ),
        (
            {"within_node": Link(bytes_per_s=None, latency_s=-0.5)},
            "cluster.within_node.latency_s is -0.5 but must not be negative.",
        ),
        ({"float32": None}, "cluster.float32 and cluster.bfloat16 are both null. Give the rates of one."),
    ],
)
def test_impossible_values(values: dict[str, Any], message: str) -> None:
    assert cluster().faults() == []
    assert cluster(**values).faults() == [message]
