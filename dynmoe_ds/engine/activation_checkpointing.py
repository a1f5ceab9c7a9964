"""DeepSpeed's activation checkpointing for models: the form that keeps auxiliary losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed.runtime.activation_checkpointing.checkpointing import non_reentrant_checkpoint as _checkpoint


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` without keeping its activations; the backward pass runs it again."""
    return _checkpoint(function, *args)
