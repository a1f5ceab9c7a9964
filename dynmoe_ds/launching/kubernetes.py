"""Kubernetes: the manifests of a job of Kubeflow's training operator or MPI operator, and their submission."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from typing import Any

import yaml

from dynmoe_ds.config.load import to_yaml
from dynmoe_ds.errors import LaunchError
from dynmoe_ds.launching.config import KubernetesConfig
from dynmoe_ds.launching.runs import Runs

_CONFIG_FOLDER, _CONFIG_FILE = "/etc/dynmoe", "config.yaml"
_PORT = 23456  # the training operator's own choice
_USER = 1000  # of the images of docker/
# The MPI operator's keys: where it mounts them, and where each pod has a copy that its user owns. ssh wants such a one,
# while the mounted ones are root's, and open to more than their owner wherever fsGroup is set.
_MOUNTED_KEYS, _KEYS = "/etc/dynmoe-ssh", "/tmp/dynmoe-ssh"
_SSH_PORT = 2222  # ports below 1024 are for root
_COPY_KEYS = f"install -d -m 700 {_KEYS} && install -m 600 {_MOUNTED_KEYS}/* {_KEYS}/"
_KUBECTL_TIMEOUT_S = 60
_TRAIN = ("-m", "dynmoe_ds", "train", "--config", f"{_CONFIG_FOLDER}/{_CONFIG_FILE}")


def job_name(launch: KubernetesConfig, runs: Runs) -> str:
    """What the job is called; by default as its run folder."""
    return launch.job_name or runs.folder.name


def render(launch: KubernetesConfig, runs: Runs) -> str:
    """The manifests, exactly as `submit` hands them to kubectl: the configuration, and the job that reads it."""
    name = job_name(launch, runs)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _config_map(name), "namespace": launch.namespace},
        "data": {_CONFIG_FILE: to_yaml(runs.configs[0])},
    }
    job = _pytorch_job(launch, runs, name) if launch.job == "pytorchjob" else _mpi_job(launch, runs, name)
    return yaml.dump_all([config_map, job], Dumper=_Dumper, sort_keys=False, width=120)


def submit(launch: KubernetesConfig, runs: Runs) -> str:
    """Hand the manifests to `kubectl create`; what it says. Raises: LaunchError with its words when it refuses."""
    try:
        done = subprocess.run(
            ["kubectl", "create", "-f", "-"],
            input=render(launch, runs),
            capture_output=True,
            text=True,
            timeout=_KUBECTL_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"kubectl did not answer within {_KUBECTL_TIMEOUT_S} s. Is the cluster up?") from error
    if done.returncode:
        raise LaunchError(f"kubectl refused the job:\n{done.stderr.strip()}")
    return done.stdout


def _config_map(name: str) -> str:
    """Not NAME-config, which is the MPI operator's own: it refuses a job for which there is one already."""
    return f"{name}-run"


def _pytorch_job(launch: KubernetesConfig, runs: Runs, name: str) -> dict[str, Any]:
    """One torchrun per pod. The operator gives each pod its number as RANK, and the first one's address."""
    ranks = runs.num_ranks // launch.nodes
    command = (
        f'exec python3 -m torch.distributed.run --nnodes {launch.nodes} --node-rank "$RANK" --nproc-per-node {ranks} '
        f'--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" {shlex.join(_TRAIN).replace("-m ", "--module ", 1)}'
    )
    container = {
        **_container(launch, "pytorch", command),  # the name by which the operator knows it
        "ports": [{"name": "pytorchjob-port", "containerPort": _PORT}],
    }
    replicas = {"Master": _replicas(launch, name, 1, container)}
    if launch.nodes > 1:
        replicas["Worker"] = _replicas(launch, name, launch.nodes - 1, container)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "namespace": launch.namespace},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "None", "backoffLimit": launch.restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _mpi_job(launch: KubernetesConfig, runs: Runs, name: str) -> dict[str, Any]:
    """A launcher whose mpirun starts the ranks on workers that run sshd. Ranks get nothing of a pod's environment.

    ssh and sshd are told all they need here, so that the image brings the programs only, and any user may run them.
    Source: what build/base of the MPI operator's repository puts into its images.
    """
    ranks = runs.num_ranks // launch.nodes
    exported = ["PATH", "MASTER_ADDR", "MASTER_PORT", *_environment(launch)]
    ssh = (
        f"-p {_SSH_PORT} -i {_KEYS}/id_rsa -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
        # The operator's own, which these arguments replace.
        "-o LogLevel=ERROR -o ConnectionAttempts=10"
    )
    command = (
        f"{_COPY_KEYS} && "
        'export MASTER_ADDR=$(head -n 1 "$OMPI_MCA_orte_default_hostfile" | cut -d " " -f 1) '
        f"MASTER_PORT={_PORT} && "
        f"exec mpirun --allow-run-as-root -np {runs.num_ranks} --bind-to none --mca plm_rsh_args {shlex.quote(ssh)} "
        # What mpirun leaves ranks for their checkpoint between SIGTERM and SIGKILL.
        f"--mca odls_base_sigkill_timeout {launch.grace_s} "
        f"{' '.join(f'-x {variable}' for variable in exported)} python3 -u {shlex.join(_TRAIN)}"
    )
    launcher = _container(launch, "launcher", command)
    del launcher["resources"]
    worker = {
        **_container(launch, "worker", _sshd()),
        # Workers are ready, and have their names in DNS, once sshd listens.
        "readinessProbe": {"tcpSocket": {"port": _SSH_PORT}, "periodSeconds": 2},
    }
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"name": name, "namespace": launch.namespace},
        "spec": {
            "slotsPerWorker": ranks,
            "sshAuthMountPath": _MOUNTED_KEYS,
            # mpirun fails if a worker has no sshd yet, and each failure is one of the restarts.
            "launcherCreationPolicy": "WaitForWorkersReady",
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": launch.restarts},
            "mpiReplicaSpecs": {
                "Launcher": _replicas(launch, name, 1, launcher),
                "Worker": _replicas(launch, name, launch.nodes, worker),
            },
        },
    }


def _sshd() -> str:
    options = {
        "AuthorizedKeysFile": f"{_KEYS}/authorized_keys",
        "StrictModes": "no",  # /tmp is everybody's
        "PidFile": "none",
    }
    return (
        f"{_COPY_KEYS} && "
        # Packages leave this folder, which sshd wants as root only, to systemd.
        "{ (( EUID )) || mkdir -p /run/sshd; } && "
        # Nothing of the image's own sshd_config, whose PAM, keys and folders are root's.
        f"exec /usr/sbin/sshd -De -f /dev/null -p {_SSH_PORT} -h {_KEYS}/id_rsa "
        f"{' '.join(f'-o {key}={value}' for key, value in options.items())} "
        # Where mpirun's daemon and its libraries are.
        '-o "SetEnv=PATH=$PATH${LD_LIBRARY_PATH:+ LD_LIBRARY_PATH=$LD_LIBRARY_PATH}"'
    )


def _replicas(launch: KubernetesConfig, name: str, count: int, container: Mapping[str, Any]) -> dict[str, Any]:
    """Pods that are started again when they fail: torchrun makes 1 of the code 85, and mpirun of a lost host."""
    spec = {
        "terminationGracePeriodSeconds": launch.grace_s,
        # The run folder's volume may be root's. Without the policy each start would go through all that is on it.
        "securityContext": {"fsGroup": _USER, "fsGroupChangePolicy": "OnRootMismatch"},
        "containers": [dict(container)],
        "volumes": [
            {"name": "config", "configMap": {"name": _config_map(name)}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": launch.claim}},
            # NCCL and data loaders need more than the 64 MB that pods have.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": spec}}


def _container(launch: KubernetesConfig, name: str, command: str) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if launch.gpus_per_node:
        limits["nvidia.com/gpu"] = launch.gpus_per_node
    if launch.cpus is not None:
        limits["cpu"] = launch.cpus
    if launch.memory_gib is not None:
        limits["memory"] = f"{launch.memory_gib}Gi"
    return {
        "name": name,
        "image": launch.image,
        "command": ["bash", "-c", command],
        "workingDir": launch.volume_path,
        "env": [{"name": key, "value": value} for key, value in _environment(launch).items()],
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG_FOLDER},
            {"name": "runs", "mountPath": launch.volume_path},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _environment(launch: KubernetesConfig) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if launch.gpus_per_node == 0:
        own["DS_ACCELERATOR"] = "cpu"
    return own | launch.variables()


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, for people to read; no anchors for what is the same in two places."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
