"""Held-out loss: the exact mean over all held-out tokens, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dynmoe_ds.config.schema import TrainingConfig
from dynmoe_ds.data import Examples, HeldOutOrder, SlowExamples
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.moe import labelled
from dynmoe_ds.training.engine import TrainingEngine


@contextmanager
def eval_mode(engine: TrainingEngine) -> Iterator[None]:
    """Evaluation mode without gradients; the mode from before comes back, also after an error."""
    was_training = engine.module.training
    engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            engine.train()


def held_out_order(training: TrainingConfig, num_held_out: int) -> HeldOutOrder:
    """This rank's order over the first `training.eval_sequences` of `num_held_out` examples, or over all of them."""
    wanted = num_held_out if training.eval_sequences is None else training.eval_sequences
    is_alone = not dist.is_initialized()
    return HeldOutOrder(
        num_sequences=min(wanted, num_held_out),
        micro_batch_size=training.micro_batch_size,
        rank=0 if is_alone else dist.get_rank(),
        world_size=1 if is_alone else dist.get_world_size(),
    )


def held_out_batch(examples: Examples, indices: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`examples.batch`. Collective for examples that are read when it is their turn: every rank.

    Raises: DataError for such an example that cannot be used, or DivergenceError that quotes another rank's.
    """

    def make() -> dict[str, Tensor]:
        return examples.batch(indices, device)

    return attempt_together(make) if isinstance(examples, SlowExamples) else make()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [B, L - 1] float32 of every token but the first, from `logits` [B, L, V] and `labels` [B, L].

    0 where the label is -100.
    """
    predictions, targets = logits[:, :-1].float(), labels[:, 1:]
    return F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def held_out_loss(engine: TrainingEngine, held_out: Examples, order: HeldOutOrder) -> float:
    """Mean cross entropy per predicted token over the first `order.num_sequences` held-out sequences, in nats.

    Repeats, which have weight 0, are not recorded as routed tokens either.
    Collective: every rank, each with its own `order`; all run the same number of forwards of the same shape.
    """
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # summed loss, number of tokens
    with eval_mode(engine):
        for indices, weights in order:
            batch = held_out.batch(indices, engine.device)
            labels = batch.pop("labels")
            weight = torch.tensor(weights, dtype=torch.float64, device=engine.device)
            with labelled(is_counted=weight > 0):
                losses = token_losses(engine(**batch).logits, labels).double()
            total += torch.stack([(losses.sum(1) * weight).sum(), weight.sum() * losses.shape[1]])
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total[0] / total[1])
