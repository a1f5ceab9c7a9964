"""The matrix products that C++ asks torch for, seen from a test."""

from __future__ import annotations

import ctypes
import threading
from importlib import import_module
from typing import Any

_MODULE: Any = import_module("dynmoe_kernels.cpu.swiglu_slots")
_TYPES = {
    "mm_out": ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 3),
    "addmm_out": ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 4, ctypes.c_double, ctypes.c_double),
}


class HookedProducts:
    """Inside the block, `threads` has the native id of the thread of every product. fails: they give an error."""

    def __init__(self, *, fails: bool = False) -> None:
        self.threads: list[int] = []
        self._fails = fails

    def __enter__(self) -> HookedProducts:
        self._functions = _MODULE._torch_functions
        found = dict(self._functions())
        self._kept = [self._hook(found, name) for name in _TYPES]  # a callback lives as long as its object
        _MODULE._torch_functions = lambda: found
        return self

    def __exit__(self, *_: object) -> None:
        _MODULE._torch_functions = self._functions

    def _hook(self, found: dict[str, int], name: str) -> Any:
        real = _TYPES[name](found[name])

        def call(*arguments: Any) -> int:
            self.threads.append(threading.get_native_id())
            return 1 if self._fails else real(*arguments)

        callback = _TYPES[name](call)
        found[name] = ctypes.cast(callback, ctypes.c_void_p).value or 0
        return callback
