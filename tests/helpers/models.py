"""Small models and DeepSpeed configurations that the engine's tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dynmoe_ds as dm
import dynmoe_ds.engine

HIDDEN = 16
FFN = 24


class TinyModel(nn.Module):
    """Linear, two residual `MoELayer`s, linear; gives the mean squared error of its tokens."""

    def __init__(
        self,
        ep_size: int,
        num_experts: int = 4,
        num_slots: int = 8,
        router: Any = "top_any",
        expert: str = "swiglu",
        checkpoint: Any = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.moe = nn.ModuleList(
            dm.MoELayer(
                hidden_size=HIDDEN,
                ffn_hidden_size=FFN,
                num_experts=num_experts,
                num_slots=num_slots,
                ep_size=ep_size,
                router=router,
                expert=expert,
                seed=100 + i,
            )
            for i in range(2)
        )
        self.last = nn.Linear(HIDDEN, HIDDEN)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.first(x)
        for layer in self.moe:
            h = h + (self.checkpoint(layer, h) if self.checkpoint else layer(h))
        error = (self.last(h).float() - y.float()).square().mean(-1)
        return error.mean() if attention_mask is None else (error * attention_mask).sum() / attention_mask.sum()


class SelectiveModel(TinyModel):
    """Tokens of this rank go through the first `num_layers` layers only, as with a modality's own experts."""

    num_layers = 2

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.first(x)
        for layer in self.moe[: self.num_layers]:
            h = h + layer(h)
        return (self.last(h) - y).square().mean()


def batch(step: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The global batch of a step: x, y [num_tokens, D], the same whatever the number of ranks."""
    g = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(num_tokens, HIDDEN, generator=g)
    return x.to(dtype), torch.randn(num_tokens, HIDDEN, generator=g)


def shard(tensors: tuple[Tensor, ...], rank: int, world_size: int) -> tuple[Tensor, ...]:
    """This rank's equal part of each tensor."""
    return tuple(t.chunk(world_size)[rank] for t in tensors)


def deepspeed_config(
    stage: int, *, lr: float = 1e-2, bf16: bool = False, clip: float = 0.0, accumulate: int = 1, **optimizer: Any
) -> dict[str, Any]:
    """DeepSpeed's configuration with AdamW, or SGD with `kind="SGD"`."""
    kind = optimizer.pop("kind", "AdamW")
    params: dict[str, Any] = {"lr": lr, **optimizer}
    if kind == "AdamW":
        # Adam divides by the gradient's size: where a gradient is rounding noise, so is the sign of a full update. This
        # eps keeps such elements out of the comparison of layouts.
        params |= {"betas": [0.9, 0.99], "weight_decay": 0.01, "eps": 1e-6}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": clip,
        "optimizer": {"type": kind, "params": params},
        "steps_per_print": 10**9,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
    return config


def gathered(engine: Any) -> dict[str, Tensor]:
    """All weights in float32, whole, with experts by id: independent of layout, slot order and ZeRO stage.

    Collective: every rank.
    """
    import torch.distributed as dist

    out: dict[str, Tensor] = {}
    layers = {name: m for name, m in engine.module.named_modules() if isinstance(m, dm.MoELayer)}
    for name, param in engine.module.named_parameters():
        rows = getattr(param, "ds_shape", param.shape)[0]
        value = engine.masters.read(param, 0, rows)["weight"]
        owner = next((n for n in layers if name.startswith(n + ".")), None)
        part = name.removeprefix(f"{owner}.")
        whole = () if owner is None else layers[owner].router.shared_parameters
        if owner is None or part.startswith("shared.") or part.removeprefix("router.") in whole:
            out[name] = value
            continue
        layer = layers[owner]
        if ".experts." in name and layer.ep_group is not None:
            parts = [torch.empty_like(value) for _ in range(layer.ep_size)]
            dist.all_gather(parts, value, group=layer.ep_group)
            value = torch.cat(parts)
        for expert_id, slot in layer.placement.slots_by_id.items():
            out[f"{name}[{expert_id}]"] = value[slot]
    return out


def expert_states(engine: Any) -> dict[str, Tensor]:
    """Master and moments of every expert by layer, parameter, id and kind. Collective."""
    import torch.distributed as dist

    out = {}
    for layer_name, layer in engine.layers.items():
        for name, param in layer.named_parameters():
            rows = engine.masters.read(param, 0, getattr(param, "ds_shape", param.shape)[0])
            for kind, value in rows.items():
                if name.startswith("experts.") and layer.ep_group is not None:
                    parts = [torch.empty_like(value) for _ in range(layer.ep_size)]
                    dist.all_gather(parts, value, group=layer.ep_group)
                    value = torch.cat(parts)
                for expert_id, slot in layer.placement.slots_by_id.items():
                    out[f"{layer_name}.{name}[{expert_id}].{kind}"] = value[slot].clone()
    return out


def train(
    engine: Any, steps: range, rank: int, world_size: int, num_tokens: int = 32, accumulate: int = 1
) -> list[float]:
    """Mean loss over ranks of every micro step."""
    import torch.distributed as dist

    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in steps:
        for micro in range(accumulate):
            x, y = shard(batch(step * accumulate + micro, num_tokens, dtype), rank, world_size)
            loss = engine(x, y)
            engine.backward(loss)
            engine.step()
            value = loss.detach().float().clone()
            dist.all_reduce(value)
            losses.append(float(value) / world_size)
    return losses


__all__ = [
    "FFN",
    "HIDDEN",
    "SelectiveModel",
    "TinyModel",
    "batch",
    "deepspeed_config",
    "expert_states",
    "gathered",
    "shard",
    "train",
]
