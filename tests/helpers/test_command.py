"""What the tests that start commands rely on."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import Started, environment

# A process that starts another, says so and waits.
_TWO = "import subprocess as s; p = s.Popen(['sleep', '300']); print('started', flush=True); p.wait()"


@pytest.mark.parametrize("dies_first", [False, True])
def test_nothing_is_left_of_a_command_even_if_its_first_process_has_died(dies_first: bool, tmp_path: Path) -> None:
    command = Started([sys.executable, "-c", _TWO], tmp_path / "said.txt")
    command.wait_until(lambda: "started" in command.output.read_text())
    (below,) = command.seen
    below.suspend()  # so that it would not end by itself
    if dies_first:
        command.process.kill()
        command.process.wait()
        assert below.is_running()
    command.kill()
    assert not psutil.wait_procs([below], timeout=10)[1] and command.process.poll() is not None
    command.kill()  # of what is gone already


def test_who_waits_for_a_command_that_ends_hears_what_it_said(tmp_path: Path) -> None:
    command = Started([sys.executable, "-c", "print('no such option')"], tmp_path / "said.txt")
    with pytest.raises(AssertionError, match="no such option"):
        command.wait_until(lambda: False)


def test_the_environment_is_of_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    for name in (*ranks, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    found = environment()
    assert not found.keys() & set(ranks)
    assert (found["OMP_NUM_THREADS"], found["DS_ACCELERATOR"]) == ("1", "cpu")
    assert found["PATH"].startswith(f"{Path(sys.executable).parent}:")
