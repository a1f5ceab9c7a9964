"""The description of a cluster from `configs/cluster/`, under overrides."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml

from dynmoe_ds.config.build import build_section
from dynmoe_ds.config.groups import CLUSTER_GROUP, CONFIG_MODULE, cluster_names, did_you_mean
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.planning.cluster import Cluster


def load_cluster(name: str, values: Sequence[tuple[str, Any]]) -> Cluster:
    """The cluster `name` with `values` by dotted key, such as ("within_node.latency_s", 1e-5).

    Raises: ConfigError with every fault: an unknown name, unknown keys, wrong and impossible values.
    """
    names = cluster_names()
    if name not in names:
        raise ConfigError(f"There is no option cluster={name}. {did_you_mean(name, names)}Options: {', '.join(names)}.")
    plain = yaml.safe_load((files(CONFIG_MODULE) / CLUSTER_GROUP / f"{name}.yaml").read_text(encoding="utf-8"))
    faults = []
    for key, value in values:
        *path, last = key.split(".")
        section: Any = plain
        for part in path:
            if isinstance(section, dict) and section.get(part) is None:
                section[part] = {}  # a link or a type that the file does not know
            section = section[part] if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = value
        else:
            faults.append(f"cluster.{key} cannot be set: {'.'.join(['cluster', *path])} is not a section.")
    if faults:
        raise ConfigError(faults)
    return build_section(Cluster, plain, CLUSTER_GROUP)
