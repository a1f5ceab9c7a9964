"""Every committed launch configuration, files of one's own, and every value that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.config.groups import config_groups, launch_names
from dynmoe_ds.launching.config import SlurmConfig
from dynmoe_ds.launching.load import load_launch

SITE = [("claim", "shared")]


@pytest.mark.parametrize("name", launch_names())
def test_every_committed_option(name: str) -> None:
    values = SITE if name.startswith("kubernetes") else []
    values = [*values, ("image", "mpi")] if name == "kubernetes_mpi" else values
    launch, faults = load_launch(name, values)
    assert launch is not None and faults == []
    assert "launch" not in config_groups(), "it is no part of a run"


def test_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    committed = Path(__file__).parents[2] / "configs" / "launch" / "slurm.yaml"
    Path("site.yaml").write_text(committed.read_text().replace("partition: null", "partition: gpu"))
    site, faults = load_launch("site.yaml", [("nodes", 3)])
    assert (
        not faults
        and isinstance(site, SlurmConfig)
        and (site.partition, site.nodes, site.time) == ("gpu", 3, "24:00:00")
    )


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    for text, message in ((None, "cannot be read"), ("a: [", "is not YAML"), ("- a", "holds no keys. Copy a file of")):
        path = tmp_path / "site.yaml"
        if text is not None:
            path.write_text(text)
        launch, (fault,) = load_launch(f"{path}", [])
        assert launch is None and message in fault
    path.write_text("name: sulrm\n")
    assert load_launch(f"{path}", []) == (
        None,
        ["launch.name is 'sulrm'. Use local, deepspeed, torchrun, slurm, kubernetes."],
    )


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("slrum", {}, "There is no option launch=slrum. Did you mean 'slurm'? Options: hosts_openmpi,"),
        ("slurm", {"node": 2}, "There is no key 'launch.node'. Did you mean 'launch.nodes'?"),
        ("slurm", {"time": 60}, "launch.time is 60 (a whole number) but must be text."),
        ("slurm", {"time": "24h"}, "launch.time is '24h', which Slurm cannot read. Write MINUTES, MINUTES:SECONDS,"),
        (
            "slurm",
            {"time": "5"},
            "launch.signal_s is 300 but must be below launch.time (5, 300 s), or the job is asked",
        ),
        ("slurm", {"signal_s": 30}, "launch.signal_s is 30 but must be at least 60: Slurm may send its signal that"),
        ("slurm", {"nodes": 0}, "launch.nodes is 0 but must be at least 1."),
        ("slurm", {"cpus_per_rank": 0}, "launch.cpus_per_rank is 0 but must be at least 1."),
        ("slurm", {"gpus_per_node": -1}, "launch.gpus_per_node is -1 but must be at least 0, for nodes without GPUs."),
        ("slurm", {"image": "a.sif"}, "launch.image is 'a.sif' but launch.container is none. Use launch.container="),
        ("slurm", {"mounts": ["/a:/a"]}, "launch.mounts is ['/a:/a'] but launch.container is none."),
        ("slurm", {"container": "pyxis"}, "launch.container is pyxis but launch.image is null. Name the image."),
        ("slurm", {"container": "docker"}, "launch.container is 'docker'. Use none, pyxis or apptainer."),
        (
            "slurm",
            {"container": "pyxis", "image": "a#b", "mounts": ["/data"]},
            "launch.mounts holds '/data'. Write HOST:CONTAINER, as in /data:/data.",
        ),
        ("slurm", {"environment": ["A"]}, "launch.environment holds 'A', which is not NAME=VALUE."),
        ("slurm", {"global_batch_size": 0}, "launch.global_batch_size is 0 but must be at least 1."),
        ("hosts_pdsh", {"hostfile": None}, "launch.hostfile is null. Name a file with a line `HOST slots=RANKS`"),
        ("hosts_pdsh", {"master_port": 80}, "launch.master_port is 80 but must be at least 1024 and below 65536."),
        ("hosts_torchrun", {"start": "rsh"}, "launch.start is 'rsh'. Did you mean 'ssh'? Use print or ssh."),
        ("kubernetes", {}, "launch.claim is null. Name the PersistentVolumeClaim of the volume for run folders and"),
        ("kubernetes", {"claim": "A_b"}, "launch.claim is 'A_b', which Kubernetes does not take. Use at most 63 small"),
        ("kubernetes", {"claim": "a", "volume_path": "w"}, "launch.volume_path is 'w' but must begin with '/'."),
        ("kubernetes", {"claim": "a", "restarts": -1}, "launch.restarts is -1 but must be at least 0."),
        ("kubernetes", {"claim": "a", "cpus": 0}, "launch.cpus is 0 but must be at least 1."),
        (
            "kubernetes",
            {"image": None},
            "launch.image is null. Name an image that has this package, such as that of docker/gpu.Dockerfile.",
        ),
        (
            "kubernetes_mpi",
            {"claim": "a"},
            "launch.image is null. Name an image that has this package, Open MPI 4, openssh-client and openssh-server; "
            "docs/clusters.md says how to make one.",
        ),
        ("local", {"nodes": 2}, "There is no key 'launch.nodes'."),
    ],
)
def test_faults(name: str, values: dict[str, Any], fault: str) -> None:
    _, faults = load_launch(name, list(values.items()))
    assert [found for found in faults if found.startswith(fault)], faults
