"""What the tests of tests/cluster say where they cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cluster import two_hosts, virtual_slurm


def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert virtual_slurm.why_not() == "Slurm's daemons are started as root, and this is another user."
    assert two_hosts.why_not() == "Network namespaces are made as root, and this is another user."
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for module, name in ((virtual_slurm, "_PATH"), (two_hosts, "_SBIN")):
        monkeypatch.setattr(module, name, f"{tmp_path}")
    assert virtual_slurm.why_not() == (
        "There is no munged and no slurmctld and no slurmd and no sbatch and no srun and no scontrol and no squeue and "
        "no sinfo and no scancel. On Debian: apt-get install slurm-wlm munge."
    )
    assert str(two_hosts.why_not("pdsh")).startswith("There is no ip and no unshare and no pdsh. On Debian: apt-get")
