"""What the training loop asks of a task: everything that depends on what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn

from dynmoe_ds.data import BrokenSamples, Examples, Grouping
from dynmoe_ds.training.engine import TrainingEngine


class HeldOutTask(Protocol):
    """What a model can be evaluated on. tokens_per_example: the mean. token_kinds: as of a `Task`."""

    @property
    def tokens_per_example(self) -> int: ...

    @property
    def token_kinds(self) -> tuple[str, ...]: ...

    def evaluate(self, engine: TrainingEngine) -> dict[str, float]:
        """Metrics by name. Collective: every rank, with the same number of forward passes of the same shape."""


class Task(Protocol):
    """What a run learns, with the data it learns from. Built on every rank; equal on all of them.

    train: the training examples. num_held_out: how many examples there are to evaluate on. tokens_per_example: what
    one example counts for in `train/tokens_seen`. token_kinds: names of the kinds of tokens that its batches tell
    apart, for the mean number of experts of each; empty where they have no `token_kinds`.
    """

    @property
    def train(self) -> Examples: ...

    @property
    def num_held_out(self) -> int: ...

    @property
    def tokens_per_example(self) -> int: ...

    @property
    def grouping(self) -> Grouping | None:
        """What the order of training goes by; None for a plain shuffle."""

    @property
    def token_kinds(self) -> tuple[str, ...]: ...

    @property
    def left_out(self) -> BrokenSamples | None:
        """Training samples that this rank could not use when it was their turn; None where that stops the run."""

    def build_model(self) -> nn.Module:
        """The model before training, float32 on the CPU, the same on every rank but for its slots' experts."""

    def evaluate(self, engine: TrainingEngine) -> dict[str, float]:
        """Metrics of the held-out data by name (`eval/...`, listed in `telemetry.metrics`), equal on all ranks.

        Collective: every rank, with the same number of forward passes of the same shape.
        """

    def write_files(self, folder: Path) -> None:
        """Write what belongs to the model but its weights, such as a tokenizer. Called once, on rank 0."""

    def sample(self, engine: TrainingEngine) -> str | None:
        """Text by the trained model for the run folder; None for a task without one. Collective: every rank."""
