"""DeepSpeed's list of hosts, read as DeepSpeed reads it, and every fault by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe_ds.launching.hostfile import read_hostfile


def test_the_same_as_deepspeed_reads(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text("# two of them\nworker-1 slots=4\n\n10.0.0.2   slots=8  # larger\n")
    hosts, faults = read_hostfile(path)
    assert (list(hosts.items()), faults) == ([("worker-1", 4), ("10.0.0.2", 8)], [])
    assert dict(fetch_hostfile(f"{path}")) == hosts


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a slots=0\n", "line 1 is 'a slots=0'. Write `HOST slots=RANKS`, at least 1."),
        ("a slots=1\nb\n", "line 2 is 'b'. Write `HOST slots=RANKS`"),
        ("a slots=1\na slots=2\n", "line 2 names a again. Give each host one line."),
        ("# none\n", "names no host. Write a line `HOST slots=RANKS` for every host."),
    ],
)
def test_faults(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text(text)
    _, (found,) = read_hostfile(tmp_path / "hostfile")
    assert fault in found


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    hosts, (fault,) = read_hostfile(tmp_path / "none")
    assert not hosts and "cannot be read (No such file or directory; from " in fault
