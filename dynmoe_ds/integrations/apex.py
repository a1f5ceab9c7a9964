"""NVIDIA's apex, whose fused kernels are optional. The package of that name on PyPI is another project."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Literal


def find_apex() -> Literal["absent", "nvidia", "stranger"]:
    """Whose package answers to the name apex: nobody's, NVIDIA's, or another project's.

    Only the class `apex.optimizers.FusedAdam` tells; the module is imported to look for it.
    """
    if importlib.util.find_spec("apex") is None:
        return "absent"
    try:
        found = hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except Exception:  # a stranger's package may fail in any way when it is imported
        found = False
    return "nvidia" if found else "stranger"
