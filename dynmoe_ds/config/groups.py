"""Which configuration groups exist and which options each has, read from the tree itself. Light: no Hydra, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files

CONFIG_MODULE = "dynmoe_configs"
# No parts of a run: what hardware can do, for `dynmoe plan`, and where a job runs, for `dynmoe launch`.
CLUSTER_GROUP = "cluster"
LAUNCH_GROUP = "launch"


def config_groups() -> dict[str, tuple[str, ...]]:
    """The options of every group of a run, `{"router": ("top_any", ...), ...}`, both in alphabetical order."""
    return {group: options for group, options in _folders().items() if group not in (CLUSTER_GROUP, LAUNCH_GROUP)}


def cluster_names() -> tuple[str, ...]:
    """The clusters that `dynmoe plan` knows, in alphabetical order."""
    return _folders()[CLUSTER_GROUP]


def launch_names() -> tuple[str, ...]:
    """The options of `dynmoe launch`'s own group, in alphabetical order."""
    return _folders()[LAUNCH_GROUP]


def _folders() -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for folder in sorted(files(CONFIG_MODULE).iterdir(), key=lambda entry: entry.name):
        if not folder.is_dir():
            continue
        options = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        if options:
            groups[folder.name] = tuple(options)
    return groups


def did_you_mean(word: str, known: Iterable[str], path: str = "") -> str:
    """`Did you mean 'router'? ` for the nearest known word, written after `path.`, or nothing when none is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    if not near:
        return ""
    name = f"{path}.{near[0]}" if path else near[0]
    return f"Did you mean {name!r}? "
