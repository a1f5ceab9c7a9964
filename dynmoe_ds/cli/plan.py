"""`dynmoe plan`: which layouts of ranks a model fits in, and how long a step would take in each."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dynmoe_ds.cli.help_text import LINE_LENGTH, override_help
from dynmoe_ds.config.groups import cluster_names, did_you_mean

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from dynmoe_ds.planning import Candidate, Cluster

DEFAULT_CLUSTER = "local_cpu"
PLAN_KEYS = {"mean_k": "experts per token, where the router does not say it"}
_SHOWN = 10
_TERMS = 3
_GIB = 2**30

_EXAMPLES = """examples:
  dynmoe plan experiment=demo
  dynmoe plan model=llama_top_p data.vocab_size=32000 data.sequence_length=2048 router=top_p \\
    plan.mean_k=2 parallel=node cluster=h100_nodes cluster.num_nodes=4
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "plan",
        help="predict step time and memory of every layout of ranks, and name the best",
        description="Print, for the run that `dynmoe train` would make with the same overrides, every layout of expert "
        "parallelism, ZeRO and checkpointing on a cluster, the fastest first: step time and what it consists of, "
        "tokens per second, memory of a rank; which do not fit; and the best one as overrides. Nothing is started. "
        "docs/planning.md has the formulas and what they leave out.",
        epilog="\n".join((_EXAMPLES, _own_overrides(), override_help())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help=f"print all layouts, not only the best {_SHOWN}")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="as of `dynmoe train`, and cluster=, cluster.KEY=, plan.mean_k=",
    )
    parser.set_defaults(run=run)


def _own_overrides() -> str:
    return "\n".join(
        (
            "overrides of this verb alone:",
            f"  cluster=NAME         {' | '.join(cluster_names())}",
            "  cluster.KEY=VALUE    such as cluster.num_nodes=4, cluster.memory_per_rank_gib=40",
            f"  plan.mean_k=NUMBER   {PLAN_KEYS['mean_k']}",
            "",
        )
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 if the model fits nowhere.

    Raises: ConfigError with every fault of the run's overrides and the verb's own.
    """
    from dynmoe_ds.cli.launcher import name_accelerator
    from dynmoe_ds.config.load import load_config
    from dynmoe_ds.errors import ConfigError

    name_accelerator(os.environ)
    from dynmoe_ds.planning import candidates, shape_of
    from dynmoe_ds.planning.load_cluster import load_cluster

    own = _OwnOverrides(arguments.overrides)
    faults, config, cluster = list(own.faults), None, None
    try:
        config = load_config(own.others)
    except ConfigError as error:
        faults += error.faults
    try:
        cluster = load_cluster(own.cluster, own.cluster_values)
    except ConfigError as error:
        faults += error.faults
    if faults or config is None or cluster is None:
        raise ConfigError(faults)
    model = shape_of(config, own.mean_k)
    parallel = config.parallel
    found = candidates(model, cluster, dtype=parallel.dtype, chunks=parallel.dispatch.chunks)
    num_rows = len(found) if arguments.all else _SHOWN
    exactly = "" if model.is_exact_k else " on average"
    print(
        f"{model.num_moe_layers} of {model.num_layers} layers with {model.num_experts} experts in {model.num_slots} "
        f"slots, {model.mean_k:g} per token{exactly}; "
        f"{model.dense_parameters + model.expert_parameters(1):,} parameters in {parallel.dtype}; "
        f"{model.tokens} tokens per rank and micro step, {model.accumulation_steps} micro steps"
    )
    print("\n".join(_lines(found, cluster, own.cluster, parallel.dispatch.ranks_per_node, num_rows)))
    return 0 if found[0].fits else 1


class _OwnOverrides:
    """What of the overrides is this verb's: the cluster's name and values, mean k; and the others, for the run."""

    def __init__(self, overrides: Sequence[str]) -> None:
        from dynmoe_ds.config.own_groups import split_overrides

        split = split_overrides(overrides, ("cluster", "plan"))
        self.cluster = DEFAULT_CLUSTER
        self.mean_k: float | None = None
        self.cluster_values: list[tuple[str, Any]] = []
        self.others = split.others
        self.faults = list(split.faults)
        for key, value in split.own:
            self._take(key, value)

    def _take(self, key: str, value: Any) -> None:
        if key == "cluster":
            self.cluster = str(value)
        elif key.startswith("cluster."):
            self.cluster_values.append((key.removeprefix("cluster."), value))
        elif key != "plan.mean_k":
            known = ", ".join(f"plan.{name}" for name in PLAN_KEYS)
            near = did_you_mean(key.removeprefix("plan."), PLAN_KEYS, "plan") if "." in key else ""
            self.faults.append(f"There is no key {key!r}. {near}The verb's own are {known}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self.mean_k = float(value)
        else:
            self.faults.append(f"plan.mean_k is {value!r} but must be a number.")


def _lines(
    found: Sequence[Candidate], cluster: Cluster, name: str, ranks_per_node: int | None, num_rows: int
) -> Iterator[str]:
    nodes = "node" if cluster.num_nodes == 1 else "nodes"
    yield f"cluster {name}: {cluster.num_nodes} {nodes} of {cluster.ranks_per_node} ranks, " + (
        f"{cluster.memory_per_rank_gib:g} GiB per rank"
    )
    yield from _wrapped(f"rates: {cluster.source}")
    yield from _wrapped(f"prediction error: {_error(cluster)}")
    fitting = [candidate for candidate in found if candidate.fits]
    if fitting:
        yield ""
        yield from _table(fitting[:num_rows])
        if len(fitting) > num_rows:
            yield f"... and {len(fitting) - num_rows} slower ones that fit; --all prints them"
    too_large = sorted((c for c in found if not c.fits), key=lambda c: c.memory.total)
    if too_large:
        yield ""
        yield f"{len(too_large)} of {len(found)} layouts do not fit into {cluster.memory_per_rank_gib:g} GiB:"
        for candidate in too_large[:num_rows]:
            yield f"  {_short(candidate):<44} {_why(candidate)}"
        if len(too_large) > num_rows:
            yield f"  ... and {len(too_large) - num_rows} larger ones; --all prints them"
    yield ""
    if fitting:
        yield f"best: {fitting[0].layout.overrides(ranks_per_node)}"
    else:
        least = too_large[0].memory.total / _GIB
        yield from _wrapped(
            f"The model fits nowhere: the smallest layout needs {least:.1f} GiB per rank. Use more nodes "
            "(cluster.num_nodes), a smaller training.micro_batch_size, parallel.dtype=bfloat16 or a smaller model."
        )


def _table(rows: Sequence[Candidate]) -> Iterator[str]:
    yield f"{'EP':>4} {'EDP':>4} {'ZeRO':>4}  {'recompute':<9} {'to nodes':<8} {'step':>9} {'tokens/s':>10} " + (
        f"{'GiB/rank':>8}  of which"
    )
    for candidate in rows:
        layout = candidate.layout
        shares = [f"{name} {value / candidate.time.total:.0%}" for name, value in candidate.time.terms().items()]
        yield (
            f"{layout.ep_size:>4} {layout.edp_size:>4} {layout.zero_stage:>4}  "
            f"{'layers' if layout.checkpointing else 'nothing':<9} {'once' if layout.by_node else '-':<8} "
            f"{_seconds(candidate.time.total):>9} {candidate.tokens_per_s:>10,.0f} "
            f"{candidate.memory.total / _GIB:>8.2f}  {', '.join(shares[:_TERMS])}"
        )


def _short(candidate: Candidate) -> str:
    layout = candidate.layout
    recomputed = ", layers recomputed" if layout.checkpointing else ""
    return f"EP {layout.ep_size}, EDP {layout.edp_size}, ZeRO-{layout.zero_stage}{recomputed}"


def _why(candidate: Candidate) -> str:
    largest = list(candidate.memory.terms().items())[:_TERMS]
    parts = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in largest)
    return f"{candidate.memory.total / _GIB:.1f} GiB: {parts}"


def _error(cluster: Cluster) -> str:
    error = cluster.held_out
    if error is None:
        return "not known, nothing was measured"
    return (
        f"on {error.num_layouts} held-out layouts of small models, step time: median {error.median_time_error:.0%}, "
        f"worst {error.worst_time_error:.0%}; memory: median {error.median_memory_error:.0%}, worst "
        f"{error.worst_memory_error:.0%}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, LINE_LENGTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
