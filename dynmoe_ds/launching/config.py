"""Where a job runs, as `configs/launch/*.yaml` say it. Simple types only; what it runs is the run's configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from dynmoe_ds.config.bounds import at_least
from dynmoe_ds.launching.slurm_time import TIME_FORMATS, seconds_of

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_MIN_SIGNAL_S = 60
# A name of Kubernetes' objects, with room for what the operators add to it.
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """What all kinds have.

    environment: `NAME=VALUE` for every rank. global_batch_size: sequences per optimiser step, whatever the number of
    ranks; `training.gradient_accumulation_steps` follows from it. None keeps the run's own.
    """

    environment: tuple[str, ...] = ()
    global_batch_size: int | None = None

    def variables(self) -> dict[str, str]:
        """`environment` by name."""
        return {name: value for name, _, value in (text.partition("=") for text in self.environment)}

    def faults(self) -> list[str]:
        """One sentence per value that cannot work by itself."""
        return list(self._faults())

    def _faults(self) -> Iterator[str]:
        for text in self.environment:
            if not _VARIABLE.fullmatch(text):
                yield f"launch.environment holds {text!r}, which is not NAME=VALUE."
        if self.global_batch_size is not None:
            yield from at_least("launch", self, 1, "global_batch_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalConfig(LaunchConfig):
    """This machine, as `dynmoe train` starts its ranks."""

    name: Literal["local"] = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class HostsConfig(LaunchConfig):
    """Machines that see one file system, listed in DeepSpeed's hostfile: lines of `HOST slots=RANKS`.

    python: the interpreter on the hosts; None for this one's path. master_addr: where rank 0 is reached; None for the
    first host of the file. ssh_options: of every ssh connection.
    """

    hostfile: str | None
    master_addr: str | None
    master_port: int
    python: str | None
    ssh_options: tuple[str, ...]

    def _faults(self) -> Iterator[str]:
        # Named, since super() without arguments does not work in a dataclass with slots.
        yield from LaunchConfig._faults(self)
        if self.hostfile is None:
            yield "launch.hostfile is null. Name a file with a line `HOST slots=RANKS` for every host."
        if not 1024 <= self.master_port < 65536:
            yield f"launch.master_port is {self.master_port} but must be at least 1024 and below 65536."


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig(HostsConfig):
    """DeepSpeed's launcher, which starts all hosts from this one through `runner`.

    runner_options: of pdsh or mpirun.
    """

    name: Literal["deepspeed"] = "deepspeed"
    runner: Literal["pdsh", "openmpi"]
    runner_options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchrunConfig(HostsConfig):
    """One torchrun per host, with the first one as the meeting point.

    start: `print` writes the command of each host, for a scheduler or for hands; `ssh` runs them from here.
    """

    name: Literal["torchrun"] = "torchrun"
    start: Literal["print", "ssh"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig(LaunchConfig):
    """A batch job, one task per rank.

    gpus_per_node: 0 on nodes without. time: as sbatch reads it. signal_s: how long before the end of that time the
    ranks are asked for a checkpoint. requeue: whether a job that was asked to stop goes to the queue again. setup:
    lines of shell before the ranks start. sbatch_options: further ones, such as `--qos=high`. container: what runs the
    image, whose interpreter is `python`; None for `python3` in an image, else for this interpreter. mounts: folders
    that an image sees beside the run folder and the folder of the submission, as `HOST:CONTAINER`. max_parallel: how
    many runs of a sweep run at the same time.
    """

    name: Literal["slurm"] = "slurm"
    nodes: int
    gpus_per_node: int
    cpus_per_rank: int | None
    time: str
    partition: str | None
    account: str | None
    signal_s: int
    requeue: bool
    setup: tuple[str, ...]
    sbatch_options: tuple[str, ...]
    container: Literal["none", "pyxis", "apptainer"]
    image: str | None
    mounts: tuple[str, ...]
    python: str | None
    max_parallel: int | None

    def _faults(self) -> Iterator[str]:
        yield from LaunchConfig._faults(self)
        yield from at_least("launch", self, 1, "nodes")
        for key in ("cpus_per_rank", "max_parallel"):
            if getattr(self, key) is not None:
                yield from at_least("launch", self, 1, key)
        if self.gpus_per_node < 0:
            yield f"launch.gpus_per_node is {self.gpus_per_node} but must be at least 0, for nodes without GPUs."
        yield from self._time_faults()
        yield from _image_faults(self.container, self.image, self.mounts)

    def _time_faults(self) -> Iterator[str]:
        seconds = seconds_of(self.time)
        if seconds is None:
            yield f"launch.time is {self.time!r}, which Slurm cannot read. Write {TIME_FORMATS}, or unlimited."
        elif self.signal_s < _MIN_SIGNAL_S:
            yield (
                f"launch.signal_s is {self.signal_s} but must be at least {_MIN_SIGNAL_S}: Slurm may send its signal "
                "that much earlier or later."
            )
        elif self.signal_s >= seconds:
            yield (
                f"launch.signal_s is {self.signal_s} but must be below launch.time ({self.time}, {seconds:g} s), or "
                "the job is asked to stop as it starts."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesConfig(LaunchConfig):
    """A job of Kubeflow's training operator (`pytorchjob`) or its MPI operator (`mpijob`), one pod per node.

    job_name: null for the run folder's. claim: the PersistentVolumeClaim of the volume that holds the run folder and
    the data, seen by all pods at `volume_path`. memory_gib, cpus: of a pod; null for what the namespace gives. grace_s:
    how long a pod that is asked to stop may take for its checkpoint. restarts: how often the job is started again.
    """

    name: Literal["kubernetes"] = "kubernetes"
    job: Literal["pytorchjob", "mpijob"]
    job_name: str | None
    namespace: str
    image: str | None
    nodes: int
    gpus_per_node: int
    cpus: int | None
    memory_gib: int | None
    claim: str | None
    volume_path: str
    grace_s: int
    restarts: int

    def _faults(self) -> Iterator[str]:
        yield from LaunchConfig._faults(self)
        yield from at_least("launch", self, 1, "nodes")
        yield from at_least("launch", self, 0, "gpus_per_node", "grace_s", "restarts")
        for key in ("cpus", "memory_gib"):
            if getattr(self, key) is not None:
                yield from at_least("launch", self, 1, key)
        for key in ("job_name", "namespace", "claim"):
            text = getattr(self, key)
            if text is not None and not DNS_LABEL.fullmatch(text):
                yield (
                    f"launch.{key} is {text!r}, which Kubernetes does not take. Use at most 63 small letters, digits "
                    "and '-'."
                )
        if self.image is None and self.job == "mpijob":
            yield (
                "launch.image is null. Name an image that has this package, Open MPI 4, openssh-client and "
                "openssh-server; docs/clusters.md says how to make one."
            )
        elif self.image is None:
            yield "launch.image is null. Name an image that has this package, such as that of docker/gpu.Dockerfile."
        if self.claim is None:
            yield "launch.claim is null. Name the PersistentVolumeClaim of the volume for run folders and data."
        if not self.volume_path.startswith("/"):
            yield f"launch.volume_path is {self.volume_path!r} but must begin with '/'."


AnyLaunchConfig: TypeAlias = LocalConfig | DeepSpeedConfig | TorchrunConfig | SlurmConfig | KubernetesConfig


def _image_faults(container: str, image: str | None, mounts: tuple[str, ...]) -> Iterator[str]:
    if container == "none":
        if image is not None or mounts:
            key, value = ("image", repr(image)) if image is not None else ("mounts", str(list(mounts)))
            yield f"launch.{key} is {value} but launch.container is none. Use launch.container=pyxis or apptainer."
    elif image is None:
        yield f"launch.container is {container} but launch.image is null. Name the image."
    for mount in mounts:
        if ":" not in mount:
            yield f"launch.mounts holds {mount!r}. Write HOST:CONTAINER, as in {mount}:{mount}."
