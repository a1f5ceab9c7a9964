import pytest
import torch

from dynmoe_kernels import forced_kernels
from tests.kernels.cases import FLOATS, Case, all_cases


@pytest.mark.parametrize("case", list(all_cases([*FLOATS, torch.float64])), ids=str)
def test_a_twin(case: Case) -> None:
    with forced_kernels("torch"):
        case.run("cpu")
