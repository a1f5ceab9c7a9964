"""Imports without searches for garbage among what is imported, which lasts as long as the process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """Import inside: faster, and no later search for garbage looks at what is there by then, that at exit included.

    torch, DeepSpeed and transformers are so many objects that searching them is seconds of a rank that starts and ends.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
