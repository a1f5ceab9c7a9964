"""What makes a job fail after it was submitted, found before: ranks and nodes, batch, paths, programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from dynmoe_ds.config.bounds import multiple
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.launching.config import (
    DNS_LABEL,
    AnyLaunchConfig,
    DeepSpeedConfig,
    HostsConfig,
    KubernetesConfig,
    LocalConfig,
    SlurmConfig,
    TorchrunConfig,
)
from dynmoe_ds.launching.freeze import sweep_table
from dynmoe_ds.launching.hostfile import read_hostfile
from dynmoe_ds.launching.kubernetes import job_name
from dynmoe_ds.launching.runs import Runs
from dynmoe_ds.telemetry.run_folder import SWEEP_FILE

# Keys of the run's configuration that name a file or a folder, whatever section they are of.
_PATH_KEYS = frozenset(
    {
        "path",
        "paths",
        "held_out_path",
        "image_folder",
        "tokenizer",
        "pretrained",
        "vision_pretrained",
        "text_pretrained",
        "start",
    }
)
_IMAGE_SUFFIXES = (".sqsh", ".sif")
_PACKAGES = {
    "sbatch": "Launch from a login node of the cluster",
    "scontrol": "Launch from a login node of the cluster",
    "squeue": "Launch from a login node of the cluster",
    "kubectl": "Install it",
    "pdsh": "Install the package pdsh",
    "mpirun": "Install Open MPI (the package openmpi-bin)",
    "ssh": "Install the package openssh-client",
}


def find_launch_faults(launch: AnyLaunchConfig, runs: Runs) -> list[str]:
    """One sentence per reason why the job could not be submitted or would fail at its start; empty when there is none.

    Left out is what needs less than whole runs: see `find_rank_faults` and `find_missing_programs`.
    """
    faults: list[str] = []
    if not isinstance(launch, KubernetesConfig):  # whose files are on a volume that only pods see
        for config in runs.configs:
            faults += [fault for fault in _missing_paths(config) if fault not in faults]
        faults += _other_sweep(runs)
    match launch:
        case LocalConfig():
            pass
        case HostsConfig():
            faults += _missing_python(launch.python)
            if runs.is_sweep:
                faults.append(
                    "A sweep is launched on hosts, which would run at the same time. Use launch=slurm or launch=local."
                )
        case SlurmConfig():
            faults += _slurm(launch, runs)
        case KubernetesConfig():
            faults += _kubernetes(launch, runs)
    return faults


def find_rank_faults(launch: AnyLaunchConfig, num_ranks: int) -> list[str]:
    """One sentence per reason why so many ranks do not fit the nodes or hosts, whatever else is wrong with the run."""
    match launch:
        case HostsConfig():
            return list(_slots(launch, num_ranks))
        case SlurmConfig() | KubernetesConfig():
            return list(_nodes(launch.nodes, launch.gpus_per_node, num_ranks))
    return []


def find_missing_programs(launch: AnyLaunchConfig) -> list[str]:
    """One sentence per program that the submission needs and that is not on the PATH."""
    match launch:
        case SlurmConfig():
            needed: tuple[str, ...] = ("sbatch", "scontrol", "squeue")
        case KubernetesConfig():
            needed = ("kubectl",)
        case DeepSpeedConfig(runner="pdsh"):
            needed = ("pdsh", "ssh")
        case DeepSpeedConfig():
            needed = ("mpirun", "ssh")
        case TorchrunConfig(start="ssh"):
            needed = ("ssh",)
        case _:
            needed = ()
    return [
        f"There is no {name} on the PATH. {_PACKAGES[name]}, or use --dry-run to see what would be submitted."
        for name in needed
        if shutil.which(name) is None
    ]


def with_global_batch(runs: Runs, size: int | None) -> Runs:
    """The runs with the gradient accumulation that makes an optimiser step take `size` sequences; None changes nothing.

    Raises: ConfigError where no whole number of micro steps does.
    """
    if size is None or size < 1:  # reported by itself
        return runs
    faults: list[str] = []
    configs = []
    for config in runs.configs:
        training, ranks = config.training, config.parallel.num_ranks
        at_once = training.micro_batch_size * ranks
        of = (
            f"the {at_once} sequences of a micro step ({ranks} ranks of training.micro_batch_size "
            f"{training.micro_batch_size})"
        )
        faults += multiple("launch.global_batch_size", size, of, at_once)
        training = replace(training, gradient_accumulation_steps=max(size // at_once, 1))
        configs.append(replace(config, training=training))
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return replace(runs, configs=tuple(configs))


def _nodes(nodes: int, gpus_per_node: int, ranks: int) -> Iterator[str]:
    if nodes < 1:
        return  # reported by itself
    of = f"launch.nodes ({nodes}), so that every node has as many"
    yield from multiple("parallel.num_ranks", ranks, of, nodes)
    per_node = -(-ranks // nodes)
    if 0 < gpus_per_node < per_node:
        yield (
            f"parallel.num_ranks is {ranks}, which is {per_node} per node, but there are only {gpus_per_node} GPUs per "
            f"node x {nodes} {'node' if nodes == 1 else 'nodes'} = {gpus_per_node * nodes}. Use "
            f"launch.nodes={-(-ranks // gpus_per_node)}, or parallel.num_ranks={gpus_per_node * nodes} with a "
            "parallel.ep_size that divides it."
        )


def _slots(launch: HostsConfig, ranks: int) -> Iterator[str]:
    if launch.hostfile is None:
        return  # reported by itself
    hosts, faults = read_hostfile(Path(launch.hostfile))
    yield from faults
    if faults:
        return
    slots = sum(hosts.values())
    if slots != ranks:
        yield (
            f"parallel.num_ranks is {ranks} but the {len(hosts)} hosts of {launch.hostfile} have {slots} slots"
            f" together. Use parallel.num_ranks={slots}, or change the slots."
        )
    if isinstance(launch, TorchrunConfig) and len(set(hosts.values())) > 1:
        yield (
            f"The hosts of {launch.hostfile} have {_listed(hosts)} slots, but torchrun needs as many on each. Change "
            "the slots, or use launch=hosts_pdsh."
        )


def _listed(hosts: Mapping[str, int]) -> str:
    return ", ".join(f"{slots}" for slots in hosts.values())


def _slurm(launch: SlurmConfig, runs: Runs) -> Iterator[str]:
    if launch.requeue and any(config.checkpoint.resume == "never" for config in runs.configs):
        yield (
            "launch.requeue is true but checkpoint.resume is never, so that the job would refuse its own run folder "
            "when it starts again. Use checkpoint.resume=auto, or launch.requeue=false."
        )
    if launch.container == "none":  # an image has its own
        yield from _missing_python(launch.python)
    image = None if launch.container == "none" else launch.image  # which is reported by itself
    if image is not None and (image.startswith(("/", "./", "../", "~")) or image.endswith(_IMAGE_SUFFIXES)):
        if not Path(image).exists():
            yield f"launch.image is {image!r}, which does not exist here ({Path.cwd()}). Correct the path."
    elif launch.container == "apptainer" and image is not None and "://" not in image:
        yield f"launch.image is {image!r}. Name a .sif file, or an address such as docker://{image}."
    for mount in launch.mounts:
        source = mount.partition(":")[0]
        if source and not Path(source).exists():
            yield f"launch.mounts names {source!r}, which does not exist here ({Path.cwd()}). Correct the path."
    if launch.max_parallel is not None and not runs.is_sweep:
        yield "launch.max_parallel is set but there is one run only. Leave it null, or give several values to sweep."


def _kubernetes(launch: KubernetesConfig, runs: Runs) -> Iterator[str]:
    if runs.is_sweep:
        yield "A sweep is launched on Kubernetes, which gets one job at a time. Launch its runs one by one."
    name = job_name(launch, runs)
    if launch.job_name is None and not DNS_LABEL.fullmatch(name):  # that one is reported by itself
        yield (
            f"The run folder's name {name!r} cannot be a job's in Kubernetes. Set launch.job_name to small letters, "
            "digits and '-'."
        )
    if not launch.volume_path.startswith("/"):
        return  # reported by itself
    volume = Path(launch.volume_path)
    for config in runs.configs:
        for key, value in _paths(config, ""):
            path = Path(value)
            if path.is_absolute() and not path.is_relative_to(volume) and _exists(value):
                yield (
                    f"{key} is {value!r}, which is on this machine. Pods see launch.volume_path ({volume}) and what is "
                    f"in the image: copy it to the volume, and use {key}={volume}/NAME."
                )
        if not Path(config.run_dir).is_relative_to(volume):
            yield (
                f"run_dir is {config.run_dir}, which is not below launch.volume_path ({volume}), so that it would be "
                f"gone with the pods. Use run_dir={volume}/NAME."
            )


def _other_sweep(runs: Runs) -> Iterator[str]:
    """Runs go on in the folders of their numbers: these must not have been of other values."""
    file = runs.folder / SWEEP_FILE
    if not runs.is_sweep or not file.exists():
        return
    before, now = file.read_text(encoding="utf-8").splitlines(), sweep_table(runs).splitlines()
    if before != now[: len(before)]:
        other = next((old for old, new in zip(before, now, strict=False) if old != new), before[-1])
        yield (
            f"{runs.folder} holds another sweep: {file.name} has the line {other!r}, which this one has not there. Use "
            "another run_dir, or move that folder away. Values may be added at the end of the first key."
        )


def _missing_paths(config: RunConfig) -> Iterator[str]:
    """Of all files and folders that the configuration names. Relative ones are from here, where the job will be."""
    for key, value in _paths(config, ""):
        if not _exists(value):
            yield f"{key} is {value!r}, which does not exist here ({Path.cwd()}). Correct the path."


def _missing_python(python: str | None) -> Iterator[str]:
    """Of an interpreter that is named by its path: hosts and nodes see it where it is here."""
    if python is not None and "/" in python and not Path(python).exists():
        yield (
            f"launch.python is {python!r}, which does not exist here ({Path.cwd()}). Correct the path, or give a name "
            "without '/' for what is on the PATH there."
        )


def _paths(section: Any, name: str) -> Iterator[tuple[str, str]]:
    for field in fields(section):
        value = getattr(section, field.name)
        key = f"{name}.{field.name}" if name else field.name
        if is_dataclass(value):
            yield from _paths(value, key)
        elif field.name in _PATH_KEYS:
            yield from ((key, path) for path in (value if isinstance(value, tuple) else (value,)) if path is not None)


def _exists(path: str) -> bool:
    """Whether there is such a file or folder, or an indexed data set, which is named without its endings."""
    return any(Path(f"{path}{ending}").exists() for ending in ("", ".bin", ".idx"))
