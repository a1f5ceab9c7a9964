import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from dynmoe_kernels import KernelChoiceError, chosen_kernels, forced_kernels, gather_rows, plan, selection, use_triton

CUDA = torch.device("cuda", 0)


class OnAnotherDevice:
    """What the choice looks at of a tensor that is on a device which this machine need not have."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA) -> None:
        self.dtype, self.device = dtype, device

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch):
    """A GPU of compute capability 9.0 with Triton, as far as the choice asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(selection, "_why_no_triton", lambda: None)
    selection._device_obstacle.cache_clear()
    yield
    selection._device_obstacle.cache_clear()


def test_the_twin_computes_on_a_cpu() -> None:
    assert chosen_kernels() == "auto"
    assert not use_triton(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_computes_on_a_gpu(a_gpu: None, dtype: torch.dtype) -> None:
    assert use_triton(OnAnotherDevice(dtype), OnAnotherDevice(torch.int64), OnAnotherDevice(torch.bool))


def test_the_twin_computes_float64_on_a_gpu(a_gpu: None) -> None:
    assert not use_triton(OnAnotherDevice(), OnAnotherDevice(torch.float64))


def test_the_twin_computes_on_an_old_gpu(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not use_triton(OnAnotherDevice())
    with forced_kernels("triton"), pytest.raises(KernelChoiceError, match=r"cuda:0 has compute capability \(7, 5\)"):
        use_triton(OnAnotherDevice())


def test_the_twin_computes_on_a_gpu_if_it_is_forced(a_gpu: None) -> None:
    with forced_kernels("torch"):
        assert not use_triton(OnAnotherDevice())


def test_the_twin_computes_on_a_gpu_without_triton(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_why_no_triton", lambda: "No module named 'triton'")
    assert not use_triton(OnAnotherDevice())
    with forced_kernels("triton"), pytest.raises(KernelChoiceError) as caught:
        use_triton(OnAnotherDevice())
    assert str(caught.value) == (
        "DYNMOE_KERNELS is triton, but Triton cannot be imported (No module named 'triton'). It comes with torch for "
        "GPUs; `pip install triton` adds it. Use auto or torch."
    )


def test_the_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNMOE_KERNELS", "torch")
    assert chosen_kernels() == "torch"
    with forced_kernels("triton"):
        assert chosen_kernels() == "triton"
        with forced_kernels("auto"):
            assert chosen_kernels() == "auto"
    assert chosen_kernels() == "torch"


def test_a_forced_choice_ends_with_an_error_inside() -> None:
    with pytest.raises(ZeroDivisionError), forced_kernels("triton"):
        raise ZeroDivisionError
    assert selection.VARIABLE not in os.environ


@pytest.mark.parametrize("how", ["variable", "context"])
def test_a_choice_that_does_not_exist(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "DYNMOE_KERNELS is 'cuda'. Use auto, triton or torch."
    with pytest.raises(KernelChoiceError) as caught:
        if how == "variable":
            monkeypatch.setenv("DYNMOE_KERNELS", "cuda")
            use_triton(torch.zeros(1))
        else:
            with forced_kernels("cuda"):
                pass
    assert str(caught.value) == message


def test_triton_forced_on_a_cpu() -> None:
    pytest.importorskip("triton")
    with forced_kernels("triton"), pytest.raises(KernelChoiceError) as caught:
        plan(torch.ones(2, 3, dtype=torch.bool), None)
    assert str(caught.value) == (
        "DYNMOE_KERNELS is triton, but the tensors are on cpu; Triton compiles for CUDA and HIP devices. "
        "Use auto or torch."
    )


def test_triton_forced_on_float64() -> None:
    indices = (torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 1]))
    with forced_kernels("triton"), pytest.raises(KernelChoiceError) as caught:
        gather_rows(torch.zeros(1, 4, dtype=torch.float64), *indices)
    assert str(caught.value) == (
        "DYNMOE_KERNELS is triton, but a tensor is float64 and the kernels know only float32, bfloat16, float16. "
        "Use auto or torch."
    )


def test_triton_forced_on_tensors_of_two_devices() -> None:
    with (
        forced_kernels("triton"),
        pytest.raises(KernelChoiceError, match="the tensors are on cpu and cuda:0; a kernel"),
    ):
        use_triton(OnAnotherDevice(), torch.zeros(1))


def test_a_cpu_without_triton_needs_none() -> None:
    """Neither the import nor an operation on a CPU asks for Triton."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, dynmoe_kernels as k; "
        "print(k.plan(torch.ones(2, 2, dtype=torch.bool), None).row_index.tolist(), k.selection._why_no_triton())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[0, 2, 1, 3] import of triton halted; None in sys.modules\n"


def test_kernels_know_nothing_of_the_framework() -> None:
    code = "import sys, dynmoe_kernels; print([m for m in sys.modules if m.startswith(('dynmoe_ds', 'triton'))])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr
    assert import_module("dynmoe_kernels.selection") is selection
