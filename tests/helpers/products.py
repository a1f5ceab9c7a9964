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
    """Inside the block, `threads` has the native id of the thread of every product.

    fails: the name of the function whose products fail, `mm_out` or `addmm_out`, since the operands come the other way
    round.
    """

    def __init__(self, *, fails: str | None = None) -> None:
        self.threads: list[int] = []
        self._fails = fails

    def __enter__(self) -> HookedProducts:
        self._real = _MODULE.torch_cpu
        found = self._real()
        callbacks = {name: self._hook(name, found.functions[name]) for name in _TYPES}
        self._kept = callbacks  # a callback lives as long as its object
        addresses = {name: ctypes.cast(callback, ctypes.c_void_p).value for name, callback in callbacks.items()}
        hooked = found._replace(functions=found.functions | addresses)
        _MODULE.torch_cpu = lambda: hooked
        return self

    def __exit__(self, *_: object) -> None:
        _MODULE.torch_cpu = self._real

    def _hook(self, name: str, address: int) -> Any:
        real = _TYPES[name](address)

        def call(*arguments: Any) -> int:
            self.threads.append(threading.get_native_id())
            if name == self._fails:
                *before, left, right = arguments[: -2 if name == "addmm_out" else None]
                arguments = (*before, right, left, *arguments[len(before) + 2 :])
            return real(*arguments)

        return _TYPES[name](call)
