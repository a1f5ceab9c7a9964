"""What the tests of tests/cluster say where they cannot run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cluster import conftest, two_hosts, virtual_slurm


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


def test_a_part_of_them_runs_where_only_the_other_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"slurm": "There is no munged.", "hosts": "There is no ip."}
    monkeypatch.setattr(virtual_slurm, "why_not", lambda: missing.get("slurm"))
    monkeypatch.setattr(two_hosts, "why_not", lambda *programs: missing.get("hosts") if "sshd" in programs else None)
    assert conftest.why_not() == "There is no munged. There is no ip."
    for there in ("slurm", "hosts"):
        told = missing.pop(there)
        assert conftest.why_not() is None
        missing[there] = told
