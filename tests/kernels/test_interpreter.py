import os
import re
import subprocess
import sys
from pathlib import Path

from tests.kernels.cases import LAYERS, kernel_cases

ROOT = Path(__file__).parents[2]


def test_every_kernel_in_tritons_interpreter() -> None:
    """In a process of its own: whether Triton interprets kernels on the CPU is settled when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DYNMOE_"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "tests/kernels/interpreted.py", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-4000:]
    # Nothing was left out or skipped.
    number = len(kernel_cases()) + len(LAYERS)
    assert re.search(rf"^{number} passed", result.stdout, re.MULTILINE), result.stdout[-2000:]
