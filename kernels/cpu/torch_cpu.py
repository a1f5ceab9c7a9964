"""What the C++ functions need of torch, and whether they may compute at all."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .. import selection
from . import build

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What they compute in, and the names of torch and of the C++ functions for it."""

FUNCTIONS = {
    "create": "aoti_torch_create_tensor_from_blob",
    "destroy": "aoti_torch_delete_tensor_object",
    "mm_out": "aoti_torch_cpu_mm_out",
    "addmm_out": "aoti_torch_cpu_addmm_out",
    "parallel_for": "torch_parallel_for",
    "what": "torch_exception_get_what_without_backtrace",
}
"""torch's C interface, by the fields of the calls in C++."""

_NOT_IN_TORCH = "This build of torch has no functions for C++ to call."

logger = logging.getLogger(__name__)


def may_compute() -> bool:
    """Whether C++ may compute what it can: with `auto` alone, where it is compiled and torch is as it needs it.

    Not under a `TorchDispatchMode`, such as torch's counter of FLOPs, which would not see the products.
    """
    return (
        selection.chosen_kernels() == "auto"
        and torch._C._len_torch_dispatch_stack() == 0
        and build.library() is not None
        and torch_cpu() is not None
    )


def obstacle() -> str | None:
    """A sentence that says why nothing can be computed here; None if it can."""
    return build.obstacle() or (None if torch_cpu() else _NOT_IN_TORCH)


class TorchCPU(NamedTuple):
    """functions: addresses by their fields in `_Call`. dtypes, device: torch's codes."""

    functions: dict[str, int | None]
    dtypes: dict[torch.dtype, int]
    device: int


@cache
def torch_cpu() -> TorchCPU | None:
    """What this build of torch has; None, with a warning, if something is missing."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = {field: getattr(library, name) for field, name in FUNCTIONS.items()}
        return TorchCPU(
            functions={field: ctypes.cast(function, ctypes.c_void_p).value for field, function in functions.items()},
            dtypes={dtype: getattr(library, f"aoti_torch_dtype_{name}")() for dtype, name in DTYPES.items()},
            device=library.aoti_torch_device_type_cpu(),
        )
    except (OSError, AttributeError) as error:
        logger.warning("%s (%s) Plain torch computes on this CPU, more slowly.", _NOT_IN_TORCH, error)
        return None
