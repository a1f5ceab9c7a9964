"""The kernels' cases in Triton's interpreter: run by test_interpreter.py in a process of its own."""

import pytest

from dynmoe_kernels import forced_kernels
from tests.kernels.cases import Case, kernel_cases


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_a_kernel(case: Case) -> None:
    with forced_kernels("triton"):
        case.run("cpu")
