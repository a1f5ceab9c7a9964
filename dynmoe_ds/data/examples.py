"""What a data set is to a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class SlowExamples(Examples, Protocol):
    """Examples whose batches are worth making ahead of time in other processes, such as images to decode."""

    def job(self, indices: Sequence[int], epochs: Sequence[int] | None = None) -> Callable[[], dict[str, Tensor]]:
        """What makes the batch on the CPU: small to send, with nothing but the examples that it needs.

        Where `batch` would have an example that cannot be read replaced, the job raises DataError.
        """
