"""One cell of the comparison: one variant, one data set, one seed, trained through `dynmoe_ds.initialize`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dynmoe_ds as dm
from benchmarks.quality.model import HIDDEN_SIZE, DenseFFN, SmallTransformer, initialise
from benchmarks.quality.tasks import SPLITS, TASKS, Batch, Task, inputs_of, losses
from benchmarks.quality.variants import Variant
from dynmoe_ds.models.parameters import count_parameters, parameter_groups
from dynmoe_ds.training.schedule import learning_rate

PEAK_LR = 4e-3
WARMUP_STEPS = 40
FINAL_LR_FRACTION = 0.1
WEIGHT_DECAY = 0.01
POINTS_OF_CURVE = 20
QUICK_STEPS = 100  # up to here, a run is to see that all works: three points of a curve, a quarter of the held-out data


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """steps: optimiser steps. `resumed_from` of the variant names the cell whose trained weights it starts from."""

    variant: Variant
    task: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.steps}-{self.variant.name}-seed{self.seed}".replace(" ", "_")


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train, evaluate on both held-out splits, and give everything that the report needs as plain values.

    Time is the processor time of this process with its one thread: what training takes on a core of its own, whatever
    else the machine does.

    Weights are kept in `folder` for variants that continue from others.
    """
    torch.set_num_threads(1)
    task = TASKS[cell.task]()
    model = build_model(cell, task)
    variant = cell.variant
    if variant.resumed_from:
        source = Cell(variant=variant.parent(), task=cell.task, seed=cell.seed, steps=cell.steps)
        load_weights(model, torch.load(folder / f"{source.name}.pt"))
    adaptation = variant.adaptation(cell.steps)
    engine = dm.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": PEAK_LR, "betas": [0.9, 0.95]}},
            "gradient_clipping": 1.0,
        },
        adaptation=adaptation,
        model_parameters=parameter_groups(model, WEIGHT_DECAY),
    )
    curve: list[dict[str, float]] = []
    live: list[list[int]] = []
    events: list[dict[str, Any]] = []
    train_s = flops = 0.0
    is_quick = cell.steps <= QUICK_STEPS
    every = cell.steps // (3 if is_quick else POINTS_OF_CURVE)
    held_out = {split: task.held_out(split)[:: 4 if is_quick else 1] for split in SPLITS}
    tokens_per_step = task.tokens_per_step()
    engine.train()
    for step in range(cell.steps):
        start = time.process_time()
        engine.set_lr(
            variant.lr_factor
            * learning_rate(
                step,
                peak=PEAK_LR,
                warmup_steps=WARMUP_STEPS,
                total_steps=cell.steps,
                final_fraction=FINAL_LR_FRACTION,
            )
        )
        batch = task.training_batch(cell.seed, step)
        wanted = batch["targets"] >= 0
        loss = losses(engine(**inputs_of(batch)), batch["targets"]).sum() / wanted.sum()
        engine.backward(loss)
        engine.step()
        train_s += time.process_time() - start
        events += [event.to_dict() for event in engine.take_events()]
        if (step + 1) % every == 0:
            records = engine.take_records()
            mean_k = {name: record.mean_k for name, record in records.items()}
            flops += 6.0 * active_parameters(model, mean_k) * tokens_per_step * every
            found = evaluate(engine, task, held_out["select"])
            curve.append(
                {
                    "step": step + 1,
                    "loss": found["loss"],
                    "train_loss": float(loss.detach()),
                    "train_s": train_s,
                    "train_flops": flops,
                    "train_mean_k": sum(mean_k.values()) / len(mean_k) if mean_k else 1.0,
                }
            )
            live.append([len(placement.live_ids) for placement in engine.placements().values()])
    final = {split: evaluate(engine, task, batches) for split, batches in held_out.items()}
    if variant.is_continued:
        torch.save(model.state_dict(), folder / f"{cell.name}.pt")
    return {
        "variant": variant.name,
        "task": cell.task,
        "seed": cell.seed,
        "steps": cell.steps,
        "final": final,
        "curve": curve,
        "live": live,
        "births": sum(len(layer["grown"]) for event in events for layer in event["layers"].values()),
        "deaths": sum(len(layer["pruned"]) for event in events for layer in event["layers"].values()),
        "train_s": train_s,
    }


def build_model(cell: Cell, task: Task) -> SmallTransformer:
    variant = cell.variant

    def make_ffn(layer: int) -> nn.Module:
        if variant.router is None:
            return DenseFFN(variant.ffn_hidden_size)
        return dm.MoELayer(
            hidden_size=HIDDEN_SIZE,
            ffn_hidden_size=variant.ffn_hidden_size,
            num_experts=variant.num_experts,
            num_slots=variant.num_slots,
            router=variant.router,
            expert="swiglu",
            seed=1000 * cell.seed + layer,
        )

    model = SmallTransformer(
        task.embedding(), make_ffn, max_length=task.max_length, num_classes=task.num_classes, is_causal=task.is_causal
    )
    initialise(model, cell.seed)
    return model


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The weights of a model with the same live experts in a pool of perhaps fewer slots."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, dm.MoELayer)}
    own = model.state_dict()
    for name, layer in layers.items():
        ids = state[f"{name}.expert_ids"].tolist()
        target = dict(layer.placement.slots_by_id)
        for key in [key for key in state if key.startswith(f"{name}.")]:
            if key.rpartition(".")[2] in ("expert_ids", "active", "next_expert_id"):
                state[key] = own[key]
            elif own[key].shape != state[key].shape:
                widened = torch.zeros_like(own[key])
                for slot, expert_id in enumerate(ids):
                    if expert_id >= 0:
                        widened[target[expert_id]] = state[key][slot]
                state[key] = widened
    model.load_state_dict(state)


def active_parameters(model: SmallTransformer, mean_k: dict[str, float]) -> float:
    """Parameters that an average token is multiplied with: all but the embeddings, which are looked up."""
    return count_parameters(model, 1).active_per_token(mean_k) - model.num_lookup_parameters()


@torch.no_grad()
def evaluate(engine: Any, task: Task, batches: list[Batch]) -> dict[str, Any]:
    """Mean loss over what is asked, mean k per layer and per token kind, load, active parameters."""
    model: SmallTransformer = engine.module
    total, count, correct = 0.0, 0, 0
    per_kind_loss: dict[str, list[float]] = {}
    engine.eval()
    with routed(model) as masks:
        kinds = []
        for batch in batches:
            logits = engine(**inputs_of(batch))
            each, wanted = losses(logits, batch["targets"]), batch["targets"] >= 0
            hits = (logits.argmax(-1) == batch["targets"]) & wanted
            total, count, correct = total + float(each.sum()), count + int(wanted.sum()), correct + int(hits.sum())
            for kind in batch["kinds"][wanted].unique().tolist() if task.kinds else []:
                of_kind = wanted & (batch["kinds"] == kind)
                sums = per_kind_loss.setdefault(task.kinds[kind], [0.0, 0.0, 0.0])
                values = (float(each[of_kind].sum()), float(hits[of_kind].sum()), float(of_kind.sum()))
                per_kind_loss[task.kinds[kind]] = [a + b for a, b in zip(sums, values, strict=True)]
            kinds.append(batch["kinds"].flatten())
    engine.train()
    flat_kinds = torch.cat(kinds)
    mean_k, mean_k_per_kind, busiest, entropy = {}, {}, {}, {}
    for name, parts in masks.items():
        mask = torch.cat(parts)
        k = mask.sum(1).double()
        load = mask.sum(0).double()
        share = load[load > 0] / load.sum()
        num_live = int(model.get_submodule(name).active.sum())
        mean_k[name] = float(k.mean())
        busiest[name] = float(share.max())
        entropy[name] = float(-(share * share.log()).sum() / math.log(num_live)) if num_live > 1 else 1.0
        mean_k_per_kind[name] = {kind: float(k[flat_kinds == i].mean()) for i, kind in enumerate(task.kinds)}
    return {
        "loss": total / count,
        "accuracy": correct / count,
        "per_kind": {kind: {"loss": s / n, "accuracy": h / n} for kind, (s, h, n) in per_kind_loss.items()},
        "mean_k": mean_k,
        "mean_k_per_kind": mean_k_per_kind,
        "busiest_share": busiest,
        "load_entropy": entropy,
        "active_parameters": active_parameters(model, mean_k),
    }


@contextmanager
def routed(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The masks [T, S] of every `MoELayer` by name while the block runs."""
    masks: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, dm.MoELayer):
            of_layer = masks.setdefault(name, [])
            hooks.append(
                module.router.register_forward_hook(lambda _m, _i, out, into=of_layer: into.append(out.mask.cpu()))
            )
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()
