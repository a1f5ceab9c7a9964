"""The random number generators of this process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def rng_state() -> dict[str, Any]:
    """The state of the generators of torch, the device, numpy and Python on this rank, as a checkpoint can hold it."""
    name, keys, *position = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position],
        "python": [version, list(internal), gauss],
    }
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "device" in state and get_accelerator().device_name() != "cpu":
        get_accelerator().set_rng_state(state["device"])
