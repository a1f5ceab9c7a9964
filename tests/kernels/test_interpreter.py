import os
import re
import subprocess
import sys
from pathlib import Path

from tests.kernels.cases import kernel_cases

ROOT = Path(__file__).parents[2]


def interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the kernels' cases in Triton's interpreter, which a process has for good from its import of Triton."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels/interpreted.py",
        "-q",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DYNMOE_"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_every_kernel_in_tritons_interpreter() -> None:
    result = interpreted("--tb=short")
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-4000:]
    # Nothing was left out or skipped.
    assert re.search(rf"^{len(kernel_cases())} passed in ", result.stdout, re.MULTILINE), result.stdout[-2000:]
