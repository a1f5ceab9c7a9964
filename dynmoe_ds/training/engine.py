"""What training asks of an engine; `dynmoe_ds.initialize` returns one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class TrainingEngine(Protocol):
    """The forward side of an engine: enough to evaluate and to generate."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, **batch: Any) -> Any: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...
