"""The description of a cluster from `configs/cluster/`, under overrides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynmoe_ds.config.build import build_section
from dynmoe_ds.config.groups import CLUSTER_GROUP, cluster_names
from dynmoe_ds.config.own_groups import read_option
from dynmoe_ds.planning.cluster import Cluster


def load_cluster(name: str, values: Sequence[tuple[str, Any]]) -> Cluster:
    """The cluster `name` with `values` by dotted key, such as ("within_node.latency_s", 1e-5).

    Raises: ConfigError with every fault: an unknown name, unknown keys, wrong and impossible values.
    """
    return build_section(Cluster, read_option(CLUSTER_GROUP, name, cluster_names(), values), CLUSTER_GROUP)
