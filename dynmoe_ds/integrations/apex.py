"""NVIDIA's apex, whose fused kernels are optional. The package of that name on PyPI is another project."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

from dynmoe_ds.errors import ConfigError

FUSED_ADAM = ("apex.optimizers", "FusedAdam", "amp_C")
FUSED_RMS_NORM = ("apex.normalization", "FusedRMSNorm", "fused_layer_norm_cuda")
"""Module, class, and the compiled extension without which the class cannot be used."""

_HOW_TO_GET_IT = (
    "Build NVIDIA's apex from its sources with `APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .`, "
    "or use NVIDIA's PyTorch image, which has it; `pip install apex` installs another project."
)


def find_apex() -> Literal["absent", "nvidia", "stranger"]:
    """Whose package answers to the name apex: nobody's, NVIDIA's, or another project's.

    Only the class `apex.optimizers.FusedAdam` tells; the module is imported to look for it.
    """
    if importlib.util.find_spec("apex") is None:
        return "absent"
    return "stranger" if _class(*FUSED_ADAM[:2]) is None else "nvidia"


def apex_class(fused: tuple[str, str, str]) -> Any:
    """A class of NVIDIA's apex that can be used here, None where there is none. fused: FUSED_ADAM or FUSED_RMS_NORM."""
    module, name, extension = fused
    if find_apex() != "nvidia" or importlib.util.find_spec(extension) is None:
        return None
    return _class(module, name)


def require_apex_class(fused: tuple[str, str, str], asked_by: str) -> Any:
    """As `apex_class`, for who has asked for it by name.

    Raises: ConfigError that says what is missing and how to get it.
    """
    found = apex_class(fused)
    if found is None:
        whose = find_apex()
        if whose == "absent":
            missing = "apex is not installed"
        elif whose == "stranger":
            missing = "the package called apex here is not NVIDIA's: run `pip uninstall apex`"
        else:
            missing = f"apex is installed without {fused[0]}.{fused[1]} or its compiled extension {fused[2]}"
        raise ConfigError(f"{asked_by}, but {missing}. {_HOW_TO_GET_IT}")
    return found


def _class(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # a stranger's package may fail in any way when it is imported
        return None
