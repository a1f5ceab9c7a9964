"""The manifests against the schemas of their custom resources, and what pods, operator and job must agree on."""

from __future__ import annotations

import copy
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dynmoe_ds.config.build import build
from dynmoe_ds.errors import LaunchError
from dynmoe_ds.launching.kubernetes import render, submit
from tests.launching.helpers import launch_of, runs_of

SCHEMAS = yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text())
KUBERNETES = "1.30"
GPUS = ("parallel.num_ranks=8", "parallel.ep_size=4", "model.num_slots=4")


def validate(manifest: Mapping[str, Any]) -> None:
    """Against the schemas that Kubernetes publishes, in which unknown fields are faults, and ours of the operators."""
    if manifest["kind"] == "ConfigMap":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, {**SCHEMAS, "$ref": f"#/$defs/{manifest['kind']}"})
    (replicas,) = (value for key, value in manifest["spec"].items() if key.endswith("ReplicaSpecs"))
    for one in replicas.values():
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": one["template"]}
        kubernetes_validate.validate(pods, KUBERNETES, strict=True)


def manifests(name: str, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    launch = launch_of(name, **{"claim": "shared", "image": "a", "nodes": 2, "gpus_per_node": 4} | values)
    runs = runs_of(*GPUS, run_dir="/workspace/runs/first", check_files=False)
    config_map, job = yaml.safe_load_all(render(launch, runs))
    assert build(yaml.safe_load(config_map["data"]["config.yaml"])) == runs.configs[0]
    return config_map, job


@pytest.mark.parametrize("name", ["kubernetes", "kubernetes_mpi"])
@pytest.mark.parametrize(
    "values",
    [{}, {"nodes": 1, "gpus_per_node": 8}, {"gpus_per_node": 0, "cpus": 4, "memory_gib": 64}, {"job_name": "moe"}],
)
def test_the_schemas_are_met(name: str, values: dict[str, Any]) -> None:
    for manifest in manifests(name, **values):
        validate(manifest)


def changed(manifest: Mapping[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at one place."""
    copied = copy.deepcopy(dict(manifest))
    place: Any = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copied


def test_the_schemas_refuse_what_is_wrong() -> None:
    config_map, job = manifests("kubernetes")
    pod = ("spec", "pytorchReplicaSpecs", "Master", "template", "spec")
    wrong = [
        changed(job, path, value)
        for path, value in (
            (("kind",), "MPIJob"), (("spec", "pytorchReplicaSpecs", "Master", "restartPolicy"), "Sometimes"),
            (("spec", "replicas"), 2), (("metadata", "name"), "My_Job"),
            ((*pod, "containers", 0, "env", 0, "value"), 1), ((*pod, "containers", 0, "comand"), ["true"]),
            ((*pod, "volumes", 1, "persistentVolumeClaim"), {}),
        )
    ]  # fmt: skip
    _, mpi_job = manifests("kubernetes_mpi")
    worker = ("spec", "mpiReplicaSpecs", "Worker")
    wrong += [
        changed(mpi_job, path, value)
        for path, value in (
            (("apiVersion",), "kubeflow.org/v1"), (("spec", "launcherCreationPolicy"), "WhenReady"),
            (("spec", "waitForWorkers"), True), (("spec", "mpiImplementation"), "MVAPICH"),
            (("spec", "sshAuthPath"), "/root/.ssh"), (("spec", "sshAuthMountPath"), 1),
            ((*worker, "template", "spec", "containers", 0, "readinessProbe", "tcpSocket"), {}),
            ((*worker, "template", "spec", "securityContext", "fsGroup"), "dynmoe"),
            ((*worker, "replicas"), 0), ((*worker, "template", "spec", "containers", 0, "command"), "sshd"),
            (("spec", "mpiReplicaSpecs", "Master"), mpi_job["spec"]["mpiReplicaSpecs"]["Launcher"]),
        )
    ]  # fmt: skip
    wrong.append({**config_map, "data": {"config.yaml": 1}})
    for manifest in wrong:
        with pytest.raises(jsonschema.ValidationError):
            validate(manifest)


def pod_of(replicas: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    pod = replicas["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    return pod, container


@pytest.mark.parametrize("name", ["kubernetes", "kubernetes_mpi"])
def test_pods_may_write_to_a_volume_of_root_s(name: str) -> None:
    (replicas,) = (value for key, value in manifests(name)[1]["spec"].items() if key.endswith("ReplicaSpecs"))
    for one in replicas.values():
        context = pod_of(one)[0]["securityContext"]
        # As the user of docker/*.Dockerfile; and the data on the volume are not gone through at each start.
        assert context == {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}


def test_the_config_map_is_not_called_as_the_operator_s_own() -> None:
    """Which is NAME-config: it does not start a job whose one is there already."""
    config_map, job = manifests("kubernetes_mpi")
    assert config_map["metadata"]["name"] == "first-run"
    for one in job["spec"]["mpiReplicaSpecs"].values():
        volumes = {volume["name"]: volume for volume in pod_of(one)[0]["volumes"]}
        assert volumes["config"]["configMap"]["name"] == "first-run"
        # Names that the operator adds to the pod's.
        assert not volumes.keys() & {"ssh-auth", "mpi-job-config"}


def test_every_pod_of_a_pytorch_job_runs_one_torchrun() -> None:
    config_map, job = manifests("kubernetes", grace_s=90, restarts=3, environment=["NCCL_DEBUG=INFO"])
    spec = job["spec"]
    assert spec["runPolicy"]["backoffLimit"] == 3
    assert {kind: of["replicas"] for kind, of in spec["pytorchReplicaSpecs"].items()} == {"Master": 1, "Worker": 1}
    for replicas in spec["pytorchReplicaSpecs"].values():
        pod, container = pod_of(replicas)
        assert (container["name"], container["ports"][0]["name"]) == ("pytorch", "pytorchjob-port"), "the operator's"
        assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
        assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
        assert pod["terminationGracePeriodSeconds"] == 90
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "shared"
    assert list(manifests("kubernetes", nodes=1, gpus_per_node=8)[1]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def words_of(command: list[str], folder: Path, program: str, **variables: str) -> list[str]:
    """What a pod's command calls `program` with, in an environment as the operator makes it."""
    stand_in = folder / program
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$MASTER_ADDR:$MASTER_PORT" "$@"\n')
    stand_in.chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    return subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout.splitlines()


def test_torchrun_understands_what_a_pod_calls_it_with(tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    _, container = pod_of(manifests("kubernetes")[1]["spec"]["pytorchReplicaSpecs"]["Worker"])
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "first-master-0", "MASTER_PORT": "23456"}
    words = words_of(container["command"], tmp_path, "python3", **given)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    parsed = parse_args(words[3:])
    assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("2", 1, "4")
    assert (parsed.master_addr, parsed.master_port, parsed.module) == ("first-master-0", 23456, True)
    mount = next(one["mountPath"] for one in container["volumeMounts"] if one["name"] == "config")
    assert [parsed.training_script, *parsed.training_script_args] == [
        "dynmoe_ds", "train", "--config", f"{mount}/config.yaml",
    ]  # fmt: skip


def test_mpirun_starts_all_ranks_and_tells_them_where_the_first_one_is(tmp_path: Path) -> None:
    spec = manifests("kubernetes_mpi", grace_s=120, environment=["NCCL_DEBUG=INFO"])[1]["spec"]
    (tmp_path / "hostfile").write_text("first-worker-0.first.default.svc slots=4\nfirst-worker-1.first slots=4\n")
    _, launcher = pod_of(spec["mpiReplicaSpecs"]["Launcher"])
    command = with_own_keys(launcher["command"], spec["sshAuthMountPath"], tmp_path)
    words = words_of(command, tmp_path, "mpirun", OMPI_MCA_orte_default_hostfile=f"{tmp_path}/hostfile")
    assert words[0] == "first-worker-0.first.default.svc:23456"
    line = shlex.join(words[1:])
    assert "-np 8 " in line and "odls_base_sigkill_timeout 120 " in line
    assert "-x MASTER_ADDR -x MASTER_PORT " in line and "-x NCCL_DEBUG " in line
    assert line.endswith("python3 -u -m dynmoe_ds train --config /etc/dynmoe/config.yaml")
    assert "resources" not in launcher, "GPUs are for the workers"
    assert spec["launcherCreationPolicy"] == "WaitForWorkersReady", "or mpirun finds no sshd and uses up restarts"
    assert spec["slotsPerWorker"] == 4 and spec["mpiReplicaSpecs"]["Worker"]["replicas"] == 2


def test_ssh_of_the_launcher_and_sshd_of_the_workers_agree(tmp_path: Path) -> None:
    """tests/cluster/test_mpi_job.py runs both; here is what needs neither."""
    spec = manifests("kubernetes_mpi")[1]["spec"]
    _, launcher = pod_of(spec["mpiReplicaSpecs"]["Launcher"])
    _, worker = pod_of(spec["mpiReplicaSpecs"]["Worker"])
    (tmp_path / "hostfile").write_text("first-worker-0 slots=4\n")
    command = with_own_keys(launcher["command"], spec["sshAuthMountPath"], tmp_path)
    words = words_of(command, tmp_path, "mpirun", OMPI_MCA_orte_default_hostfile=f"{tmp_path}/hostfile")
    ssh = words[words.index("plm_rsh_args") + 1].split()
    port, key = (ssh[ssh.index(option) + 1] for option in ("-p", "-i"))
    assert worker["readinessProbe"]["tcpSocket"] == {"port": int(port)}, "which is ready once sshd listens"
    assert int(port) >= 1024, "or the images' user may not listen"
    assert key == f"{tmp_path}/own/id_rsa" and Path(key).read_text() == "a key", "a copy, since root's is refused"
    assert Path(key).stat().st_mode & 0o777 == 0o600 and Path(key).parent.stat().st_mode & 0o777 == 0o700
    # As root the worker would make /run/sshd, here too.
    bash = [text.replace("(( EUID ))", "true") for text in worker["command"]]
    command = with_own_keys(bash, spec["sshAuthMountPath"], tmp_path, **{"/usr/sbin/sshd": f"{tmp_path}/sshd"})
    (tmp_path / "own" / "id_rsa").unlink()
    sshd = words_of(command, tmp_path, "sshd", LD_LIBRARY_PATH="/opt/lib")[1:]
    assert sshd[sshd.index("-p") + 1] == port and sshd[sshd.index("-h") + 1] == key and Path(key).exists()
    assert f"AuthorizedKeysFile={tmp_path}/own/authorized_keys" in sshd
    assert f"SetEnv=PATH={tmp_path}:{os.environ['PATH']} LD_LIBRARY_PATH=/opt/lib" in sshd
    assert all(not spec["sshAuthMountPath"].startswith(f"{path}/") for path in mounts_of(worker)), "it would hide it"


def with_own_keys(command: list[str], mounted: str, folder: Path, **others: str) -> list[str]:
    """A pod's command with its keys in `folder`, as the operator mounts them: open to all."""
    (folder / "mounted").mkdir(exist_ok=True)
    for name in ("id_rsa", "id_rsa.pub", "authorized_keys"):
        (folder / "mounted" / name).write_text("a key")
    places = {mounted: f"{folder}/mounted", "/tmp/dynmoe-ssh": f"{folder}/own", **others}
    for pod, here in places.items():
        assert any(pod in text for text in command)
        command = [text.replace(pod, here) for text in command]
    return command


def mounts_of(container: Mapping[str, Any]) -> list[str]:
    return [mount["mountPath"] for mount in container["volumeMounts"]]


def test_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "$@"; cat > received\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    launch, runs = launch_of("kubernetes", claim="a"), runs_of(run_dir="/workspace/a", check_files=False)
    assert submit(launch, runs) == "create -f -\n"
    assert Path("received").read_text() == render(launch, runs), "what --dry-run prints"
    kubectl.write_text("#!/bin/sh\necho 'no matches for kind \"PyTorchJob\"' >&2; exit 1\n")
    with pytest.raises(LaunchError, match='kubectl refused the job:\nno matches for kind "PyTorchJob"'):
        submit(launch, runs)
