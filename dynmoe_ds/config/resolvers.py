"""What values in YAML may be computed from. A resolver whose arguments make no sense gives null, which is then reported
where the value stands."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Rows of every train.tsv of the GLUE download; of QQP, those that are not broken.
GLUE_ROWS = {
    "cola": 8551,
    "sst2": 67349,
    "mrpc": 3668,
    "qqp": 363846,
    "stsb": 5749,
    "mnli": 392702,
    "qnli": 104743,
    "rte": 2490,
    "wnli": 635,
}


def register_resolvers() -> None:
    """Make `${share_of:...}`, `${steps_of_epochs:...}` and `${glue_rows:...}` known to OmegaConf."""
    OmegaConf.register_new_resolver("share_of", _share_of, replace=True)
    OmegaConf.register_new_resolver("steps_of_epochs", _steps_of_epochs, replace=True)
    OmegaConf.register_new_resolver("glue_rows", GLUE_ROWS.get, replace=True)


def _share_of(total: Any, share: float) -> int | None:
    """`${share_of:${training.steps},0.4}`: a part of a number, rounded down."""
    return int(total * share) if isinstance(total, int | float) else None


def _steps_of_epochs(epochs: float, *, _root_: DictConfig) -> int | None:
    """`${steps_of_epochs:10}`: the optimiser steps, at least 1, that read `data.num_train` examples so many times."""
    numbers = [_root_.training.micro_batch_size, _root_.training.gradient_accumulation_steps, _root_.parallel.num_ranks]
    num_train = _root_.data.get("num_train")
    if not all(isinstance(value, int) for value in (num_train, *numbers)):
        return None
    # Where one of them is 0 or less, that is its own fault to report.
    return max(round(epochs * num_train / max(math.prod(numbers), 1)), 1)
