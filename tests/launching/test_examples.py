"""The files of launch/ are what `dynmoe launch` prints."""

from __future__ import annotations

import subprocess

import pytest

from tests.launching.examples import EXAMPLES, FOLDER, in_the_project


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_is_current(name: str) -> None:
    assert in_the_project(EXAMPLES[name]) == (FOLDER / name).read_text(), "python -m tests.launching.examples writes it"


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.endswith(".sbatch")])
def test_bash_reads_it(name: str) -> None:
    subprocess.run(["bash", "-n", f"{FOLDER / name}"], check=True)
