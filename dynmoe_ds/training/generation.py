"""A short sample from a model in training, token by token on all ranks in step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dynmoe_ds.training.engine import TrainingEngine
from dynmoe_ds.training.evaluation import eval_mode


def generate(
    engine: TrainingEngine,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    context_length: int,
    temperature: float,
    seed: int,
    stop_token: int,
) -> list[int]:
    """The prompt's ids with up to `num_tokens` more, ending early after `stop_token`.

    The model sees the last `context_length` tokens and keeps no cache: the loop is as plain as can be, because with
    expert parallelism or ZeRO-3 every forward is collective and all ranks must run the same ones. `temperature` 0
    takes the likeliest token. The same seed gives the same text.

    Collective: every rank, with the same arguments. Rank 0 chooses each token, so that ranks cannot drift apart.
    """
    assert prompt, "the prompt must hold at least one token"
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    with eval_mode(engine):
        for _ in range(num_tokens):
            context = torch.tensor([ids[-context_length:]], device=engine.device)
            logits = engine(input_ids=context, logits_to_keep=1).logits[0, -1]
            token = _choose(logits, temperature, generator)
            if dist.is_initialized():
                dist.broadcast(token, src=0)
            ids.append(int(token))
            if ids[-1] == stop_token:
                break
    return ids


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token id [1] on the device of `logits` [V]; drawn on the CPU, where a seed means the same everywhere."""
    if temperature == 0:
        return logits.argmax(keepdim=True)
    probabilities = (logits.float().cpu() / temperature).softmax(0)
    return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)
