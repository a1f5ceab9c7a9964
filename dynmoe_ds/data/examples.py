"""What a data set is to a training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Examples(Protocol):
    """Examples by index: sequences of text, sentences with a label, images."""

    def __len__(self) -> int: ...

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The arguments of the model's forward pass, `labels` included: the model's output then has a `loss`.

        epochs: in training, the pass over the data that each of them belongs to, for examples that change from pass to
        pass, such as crops of images.
        `token_kinds` [B, L] int64 may be among them, a label per token for observation (-1: none); it goes to the
        engine alone.
        """
