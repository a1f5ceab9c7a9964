"""Who computes an operation: its Triton kernel or its twin in plain torch."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

VARIABLE = "DYNMOE_KERNELS"
"""The environment variable that holds the choice, one of `CHOICES`; `auto` where it is not set."""

CHOICES = ("auto", "triton", "torch")

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_NVIDIA = (8, 0)  # sm_80: the oldest target that tests compile the kernels for

logger = logging.getLogger(__name__)


class KernelChoiceError(RuntimeError):
    """A choice of kernels that does not exist, or that cannot compute what it was given."""


@contextmanager
def forced_kernels(choice: str) -> Iterator[None]:
    """`choice` for all operations inside, whatever was chosen before. For the whole process, not for one thread.

    It sets the environment variable, since autograd runs backward passes in threads that see nothing narrower.

    Raises: KernelChoiceError for a choice that does not exist.
    """
    _check(choice)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def chosen_kernels() -> str:
    """The choice in force.

    Raises: KernelChoiceError for a choice that does not exist.
    """
    return _check(os.environ.get(VARIABLE, "auto"))


def use_triton(*tensors: Tensor) -> bool:
    """Whether the Triton kernel computes an operation on `tensors`.

    With `auto` it does where all of them are on one CUDA or HIP device that the kernels are compiled for, no
    floating-point one is wider than float32, and Triton can be imported.

    Raises: KernelChoiceError if `triton` was chosen and cannot do it.
    """
    choice = chosen_kernels()
    if choice == "torch" or (choice == "auto" and tensors[0].device.type != "cuda"):
        return False
    obstacle = _obstacle(tensors)
    if choice == "triton" and obstacle is not None:
        raise KernelChoiceError(f"{VARIABLE} is triton, but {obstacle} Use auto or torch.")
    return obstacle is None


def _check(choice: str) -> str:
    if choice not in CHOICES:
        raise KernelChoiceError(f"{VARIABLE} is {choice!r}. Use {', '.join(CHOICES[:-1])} or {CHOICES[-1]}.")
    return choice


def _obstacle(tensors: tuple[Tensor, ...]) -> str | None:
    """A sentence that says why no Triton kernel can work on `tensors`; None if one can."""
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        return f"the tensors are on {' and '.join(devices)}; a kernel needs them on one device."
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in _KERNEL_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KERNEL_DTYPES)
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')} and the kernels know only {names}."
    if (reason := _why_no_triton()) is not None:
        return f"Triton cannot be imported ({reason}). It comes with torch for GPUs; `pip install triton` adds it."
    device = tensors[0].device
    if device.type == "cuda":
        return _device_obstacle(device.index)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter: for tests
    return f"the tensors are on {device}; Triton compiles for CUDA and HIP devices."


@cache
def _why_no_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may fail in any way when it is imported
        if torch.cuda.is_available():
            logger.warning("Triton cannot be imported (%s): plain torch computes what its kernels would.", error)
        return str(error)
    return None


@cache
def _device_obstacle(index: int) -> str | None:
    if torch.version.hip is not None or (capability := torch.cuda.get_device_capability(index)) >= _OLDEST_NVIDIA:
        return None
    return f"cuda:{index} has compute capability {capability}, below {_OLDEST_NVIDIA}."
