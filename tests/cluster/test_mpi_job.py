"""What an MPIJob's pods run, with real sshd and mpirun on two hosts, and keys as the MPI operator mounts them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynmoe_ds.launching.kubernetes import render
from tests.cluster import two_hosts
from tests.launching.helpers import launch_of, runs_of

pytestmark = pytest.mark.cluster

# A pod's own folders, in a namespace of its own: nobody here has a /run/sshd, and user 1000 has a name.
_POD = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/bin
cp -r {folder}/keys /run/keys
cp {folder}/rank /run/bin/python3
cp {folder}/passwd /run/passwd
mount --bind /run/passwd /etc/passwd
mount -t tmpfs -o mode=1777 tmpfs /tmp
cd /
export PATH=/run/bin:$PATH OMPI_MCA_orte_default_hostfile=/run/keys/hostfile
export OMPI_MCA_orte_keep_fqdn_hostnames=true OMPI_MCA_plm_rsh_args='-o ConnectionAttempts=10'
exec setpriv --reuid {user} --regid {user} --groups {user} bash -c "$0"
"""
_RANK = """#!/bin/sh
ranks="$OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE"
echo "$ranks on $(hostname) as $(id -u), $MASTER_ADDR $NCCL_DEBUG $LD_LIBRARY_PATH: $*"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Keys, as the operator makes and mounts them: root's, and everybody may read them."""
    with tempfile.TemporaryDirectory(prefix="dynmoe-mpi-") as made:
        keys = Path(made) / "keys"
        keys.mkdir()
        key = keys / "id_rsa"
        make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f", f"{key}"]
        subprocess.run(make, check=True)
        (keys / "authorized_keys").write_text((keys / "id_rsa.pub").read_text())
        (keys / "hostfile").write_text("".join(f"{name} slots=1\n" for name in two_hosts.NAMES))
        key.chmod(0o644)
        (Path(made) / "rank").write_text(_RANK)
        (Path(made) / "rank").chmod(0o755)
        users = "root:x:0:0::/:/bin/bash\nsshd:x:110:65534::/run/sshd:/usr/sbin/nologin\npod:x:1000:1000::/:/bin/bash\n"
        (Path(made) / "passwd").write_text(users)
        yield Path(made)


@pytest.fixture
def hosts() -> Iterator[two_hosts.TwoHosts]:
    """Without an sshd: the workers bring theirs."""
    if reason := two_hosts.why_not("ssh", "sshd", "ssh-keygen", "mpirun", "setpriv"):
        pytest.skip(reason)
    both = two_hosts.TwoHosts()
    try:
        both.start()
        yield both
    finally:
        both.stop()


@pytest.mark.parametrize("user", [1000, 0])
def test_the_launcher_starts_a_rank_on_every_worker(hosts: two_hosts.TwoHosts, folder: Path, user: int) -> None:
    launch = launch_of("kubernetes_mpi", image="a", claim="a", nodes=2, environment=["NCCL_DEBUG=INFO"])
    _, job = yaml.safe_load_all(render(launch, runs_of(run_dir="/workspace/first", check_files=False)))
    keys = job["spec"]["sshAuthMountPath"]
    containers = {
        kind: replicas["template"]["spec"]["containers"][0] for kind, replicas in job["spec"]["mpiReplicaSpecs"].items()
    }

    def words(number: int, container: dict[str, Any]) -> list[str]:
        *bash, command = container["command"]
        assert bash == ["bash", "-c"]
        pod = _POD.format(folder=folder, user=user)
        return hosts.words(number, "bash", "-c", pod, command.replace(keys, "/run/keys"))

    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin", "NCCL_DEBUG": "INFO"}
    workers = [
        subprocess.Popen(words(number, containers["Worker"]), env={**environment, "LD_LIBRARY_PATH": "/opt/lib"})
        for number in range(2)
    ]
    try:
        port = containers["Worker"]["readinessProbe"]["tcpSocket"]["port"]
        probe = hosts.words(0, "bash", "-c", f"exec 3<>/dev/tcp/{two_hosts.NAMES[1]}/{port}")

        def is_ready() -> bool:
            assert not any(worker.poll() for worker in workers), "sshd does not start"
            return subprocess.run(probe, capture_output=True, check=False).returncode == 0

        hosts.wait_for(is_ready)
        launcher = words(0, containers["Launcher"])
        done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=120, check=False)
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait(timeout=10)
    assert done.returncode == 0, done.stderr
    arguments = "-u -m dynmoe_ds train --config /etc/dynmoe/config.yaml"
    # mpirun starts the first host's rank by itself, the other one through ssh.
    assert sorted(done.stdout.splitlines()) == [
        f"0 of 2 on {two_hosts.NAMES[0]} as {user}, {two_hosts.NAMES[0]} INFO : {arguments}",
        f"1 of 2 on {two_hosts.NAMES[1]} as {user}, {two_hosts.NAMES[0]} INFO /opt/lib: {arguments}",
    ]
