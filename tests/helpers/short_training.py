"""A short training run on real text in one process, for what only training can show of a router's controller."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynmoe_ds as dm
from dynmoe_ds.routing import RouterConfig, update_routers

TOKENS, CONTEXT, HIDDEN = 256, 8, 32
TEXT = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)  # comes with CPython


class ShortRun(NamedTuple):
    """mean_k, losses [steps]; the layer as it ended."""

    mean_k: Tensor
    losses: Tensor
    layer: dm.MoELayer


def train_shortly(router: str | RouterConfig, *, steps: int, num_experts: int = 8) -> ShortRun:
    """Train a model that predicts a byte of text from the eight before it, through one residual `MoELayer`.

    On one thread: operations this small only wait for each other on more.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(router, steps, num_experts)
    finally:
        torch.set_num_threads(num_threads)


def _train(router: str | RouterConfig, steps: int, num_experts: int) -> ShortRun:
    torch.manual_seed(3)
    embedding = nn.Embedding(256 * CONTEXT, HIDDEN)  # of a byte and its place
    norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
    head = nn.Linear(HIDDEN, 256)
    layer = dm.MoELayer(
        hidden_size=HIDDEN,
        ffn_hidden_size=HIDDEN,
        num_experts=num_experts,
        num_slots=num_experts,
        router=router,
        expert="gelu",
        seed=5,
    )
    model = nn.ModuleList([embedding, norms, head, layer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    mean_k, losses = [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        at = torch.randint(len(TEXT) - CONTEXT, (TOKENS,), generator=torch.Generator().manual_seed(step))
        windows = TEXT[at[:, None] + torch.arange(CONTEXT + 1)].long()
        with dm.StepLedger() as ledger:
            h = embedding(windows[:, :CONTEXT] + 256 * torch.arange(CONTEXT)).sum(1)
            h = h + layer(norms[0](h))
            loss = F.cross_entropy(head(norms[1](h)), windows[:, CONTEXT])
        (loss + ledger.aux_loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        records = ledger.records()
        update_routers(dict.fromkeys(records, layer.router), records, dict.fromkeys(records, layer.active))
        mean_k.append(next(iter(records.values())).mean_k)
        losses.append(float(loss.detach()))
    return ShortRun(mean_k=torch.tensor(mean_k), losses=torch.tensor(losses), layer=layer)
