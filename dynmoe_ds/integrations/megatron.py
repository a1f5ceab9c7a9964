"""megatron-core, which is optional."""

from __future__ import annotations

import importlib.metadata

DISTRIBUTION = "megatron-core"


def find_megatron() -> str | None:
    """The version of the installed megatron-core, None where there is none. Nothing of it is imported."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
