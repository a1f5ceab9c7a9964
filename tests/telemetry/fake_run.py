"""A made-up run folder that looks like a real one, for the tests of the report."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from dynmoe_ds.telemetry.run_folder import RunFolder

TOKENS_PER_STEP = 2048


def write_fake_run(
    path: Path,
    *,
    steps: int = 300,
    log_every: int = 5,
    eval_every: int = 50,
    adapt_every: int = 30,
    num_layers: int = 2,
    num_slots: int = 16,
    seed: int = 0,
    exact_match: dict[str, float] | None = None,
) -> Path:
    """Write a run whose experts are born and pruned at random. `adapt_every` or `eval_every` 0: never.

    exact_match: by kind, and of all as `""`, the shares of held-out answers at the end.
    """
    random_numbers = random.Random(seed)
    layers = {f"model.layers.{2 * index + 1}.mlp": dict.fromkeys(range(4), 1.0) for index in range(num_layers)}
    next_id = dict.fromkeys(layers, 4)
    folder = RunFolder(path)
    folder.write_config("seed: 0\nmodel:\n  hidden_size: 128\n  note: a < b & c\n")
    folder.write_versions()
    for step in range(1, steps + 1):
        if step % log_every == 0:
            _log(folder, step, layers, log_every, random_numbers)
        if eval_every and step % eval_every == 0:
            folder.append_metrics(step, {"eval/loss": 3.2 + 5 * math.exp(-step / 80)}, time_s=step * 0.2 + 0.1)
        if adapt_every and step % adapt_every == 0:
            folder.append_adaptation(_adapt(step, adapt_every, layers, next_id, num_slots, random_numbers))
    if exact_match is not None:
        shares = {"eval/exact_match" + (f"/{kind}" if kind else ""): share for kind, share in exact_match.items()}
        folder.append_metrics(steps, shares, time_s=steps * 0.2 + 0.2)
    folder.write_sample("The import statement <b>binds</b> the name of the module in the local namespace & returns.")
    folder.close()
    return path


def _log(folder: RunFolder, step: int, layers: dict[str, dict[int, float]], every: int, rng: random.Random) -> None:
    values = {
        "train/loss": 3.0 + 6 * math.exp(-step / 80) + rng.gauss(0, 0.08),
        "train/aux_loss": 0.02,
        "train/learning_rate": 3e-4,
        "train/gradient_norm": 1 + rng.random(),
        "train/tokens_per_second": 10240 + rng.gauss(0, 300),
        "train/step_time_s": 0.2,
    }
    loads = {}
    num_tokens = TOKENS_PER_STEP * every
    for layer, popularity in layers.items():
        total = sum(popularity.values())
        mean_k = 1.2 + 0.8 * (1 - math.exp(-step / 100)) + rng.gauss(0, 0.03)
        for expert_id in popularity:
            popularity[expert_id] = max(0.0, popularity[expert_id] + rng.gauss(0, 0.12))
        load = {
            str(expert_id): min(num_tokens, round(num_tokens * mean_k * popularity[expert_id] / max(total, 0.1)))
            for expert_id in popularity
        }
        num_unrouted = round(num_tokens * 0.08 * math.exp(-step / 150) * (0.7 + 0.6 * rng.random()))
        loads[layer] = {"load": load, "num_tokens": num_tokens, "num_unrouted": num_unrouted}
        values[f"moe/mean_k/{layer}"] = sum(load.values()) / num_tokens
        values[f"moe/live_experts/{layer}"] = len(load)
        values[f"moe/unrouted_share/{layer}"] = num_unrouted / num_tokens
    if layers:
        values["moe/mean_k"] = sum(values[f"moe/mean_k/{layer}"] for layer in layers) / len(layers)
    folder.append_metrics(step, values, time_s=step * 0.2)
    folder.append_experts(step, loads)


def _adapt(
    step: int,
    every: int,
    layers: dict[str, dict[int, float]],
    next_id: dict[str, int],
    num_slots: int,
    rng: random.Random,
) -> dict[str, Any]:
    changes = {}
    for layer, popularity in layers.items():
        before = dict(popularity)
        weakest = min(popularity, key=lambda expert_id: popularity[expert_id])
        pruned = [weakest] if len(popularity) > 2 and popularity[weakest] < 0.55 else []
        for expert_id in pruned:
            del popularity[expert_id]
        grown = []
        wants_expert = rng.random() < 0.75
        if wants_expert and len(popularity) < num_slots:
            parent = max(popularity, key=lambda expert_id: popularity[expert_id])
            grown = [
                {
                    "expert_id": next_id[layer],
                    "slot": len(popularity),
                    "rank": 0,
                    "parent_id": parent,
                    "seeding": "copy_nearest",
                }
            ]
            popularity[next_id[layer]] = popularity[parent] * 0.8
            next_id[layer] += 1
        changes[layer] = {
            "pruned": pruned,
            "grown": grown,
            "moved": [],
            "live_before": len(before),
            "live_after": len(popularity),
            "num_slots": num_slots,
            "tokens_per_expert": {str(expert_id): round(value * 500) for expert_id, value in before.items()},
            "num_tokens": TOKENS_PER_STEP,
            "num_unrouted": 31,
            "out_of_slots": wants_expert and not grown,
            "mean_k": 1.9,
        }
    return {"step": step, "window_steps": every, "rule": "paper", "layers": changes, "warnings": []}
