"""What a model says of held-out examples: every example once, whatever the number of ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.data import Examples, HeldOutOrder
from dynmoe_ds.moe import labelled
from dynmoe_ds.training.engine import TrainingEngine
from dynmoe_ds.training.evaluation import eval_mode, held_out_batch


class Predictions(NamedTuple):
    """Outputs [N, C] and labels [N] of N examples in their order, both float64 on the CPU."""

    outputs: Tensor
    labels: Tensor


def predict(engine: TrainingEngine, examples: Examples, order: HeldOutOrder) -> Predictions:
    """The model's `logits` for the first `order.num_sequences` examples, equal on all ranks.

    Collective: every rank, each with its own `order`; all run the same number of forwards. Raises: as `held_out_batch`.
    """
    rows = []
    with eval_mode(engine):
        for indices, weights in order:
            batch = held_out_batch(examples, indices, engine.device)
            labels = batch.pop("labels")
            with labelled(is_counted=torch.tensor(weights, device=engine.device) > 0):
                outputs = engine(**batch).logits
            places = torch.tensor([weights, indices], dtype=torch.float64, device=engine.device).T
            rows.append(torch.cat([places, labels[:, None].double(), outputs.double()], dim=1))
    own = torch.cat(rows)
    everyone = [own]
    if dist.is_initialized():
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
    table = torch.cat(everyone).cpu()
    table = table[table[:, 0] > 0]  # repeats that fill the last batches have weight 0
    table = table[table[:, 1].argsort()]
    return Predictions(outputs=table[:, 3:], labels=table[:, 2])
