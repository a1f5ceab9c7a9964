"""The vision-language recipes as they are, from the command in the docs to the trained model, at tiny sizes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.no_report import draw_no_report
from tests.helpers.recipe_parts import DECODERS, NUM_LAYERS, recipe_overrides, write_recipe_parts
from tests.helpers.spawn import run_ranks
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

import dynmoe_ds as dm
from dynmoe_ds.cli import train
from dynmoe_ds.cli.main import main
from dynmoe_ds.config.load import load_config
from dynmoe_ds.moe import moe_layers
from dynmoe_ds.training import Trainer

# Sizes, steps and what is for long runs; everything else is the recipe's.
_SMALL = [
    "parallel.num_ranks=2", "parallel.ep_size=2", "training.steps=3", "training.micro_batch_size=2",
    "training.log_every_steps=1", "training.eval_every_steps=3", "adaptation.every_steps=2",
    "adaptation.window_steps=2",
    "data.num_workers=0", "telemetry=disabled",
]  # fmt: skip
STAGES = ("projector", "language", "experts")
TEXT, PROJECTOR = "model.language_model.", "model.multi_modal_projector."
FFN = {"stablelm": "gate_proj.weight", "qwen": "gate_proj.weight", "phi": "fc1.weight"}


PADDING = 32  # elements that DeepSpeed adds so that its partitions are equally long


@dataclass(frozen=True)
class Held:
    """What an engine holds on one rank at a stage's end: numbers of elements, but for the first two."""

    dtypes: set[torch.dtype]
    zero_stage: int
    trained: int
    frozen: int
    masters: int
    moments: dict[str, int]

    @classmethod
    def by(cls, engine: Any, rank: int) -> Held:
        """Experts are on one rank of the two; the others' parameters are on both and count on the first."""
        inner = engine.optimizer.optimizer  # DeepSpeed's wraps torch's, which has what it updates and its state
        moments: dict[str, int] = {}
        for state in inner.state.values():
            for key, value in state.items():
                if value.numel() > 1:  # not the count of steps
                    moments[key] = moments.get(key, 0) + value.numel()
        params = dict(engine.module.named_parameters())
        counted = [param for name, param in params.items() if ".experts." in name or rank == 0]
        return cls(
            dtypes={param.dtype for param in params.values()},
            zero_stage=engine.zero_optimization_stage(),
            trained=sum(param.numel() for param in counted if param.requires_grad),
            frozen=sum(param.numel() for param in counted if not param.requires_grad),
            masters=sum(param.numel() for group in inner.param_groups for param in group["params"]),
            moments=moments,
        )


def train_stages(rank: int, world_size: int, commands: dict[str, list[list[str]]]) -> dict[str, list[Held]]:
    """Every stage of every recipe; what the engine holds at the end of each."""
    draw_no_report()
    found: dict[str, list[Held]] = {name: [] for name in commands}
    for name, stages in commands.items():
        for overrides in stages:
            trainer = Trainer(load_config(overrides))
            trainer.run()
            found[name].append(Held.by(trainer.engine, rank))
    return found


Runs = tuple[Path, list[dict[str, list[Held]]]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe_parts(tmp_path_factory.mktemp("parts"), *DECODERS)


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of all recipes' runs, and what ranks held. `dynmoe stages` would start a launcher for each stage."""
    folder = tmp_path_factory.mktemp("runs")
    commands: dict[str, list[list[str]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        for name in DECODERS:
            started: list[list[str]] = []
            patch.setattr(train, "run", lambda given, to=started: to.append(given.overrides) or 0)
            assert main(["stages", *recipe_overrides(parts, name), *_SMALL, f"run_dir={folder / name}"]) == 0
            commands[name] = started
    assert [len(started) for started in commands.values()] == [3, 3, 3]
    return folder, run_ranks(train_stages, 2, commands, timeout_s=500)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().bfloat16() for name, weight in model.named_parameters()}


def pretrained(parts: Path, name: str) -> dict[str, Tensor]:
    """What the user's folders hold, by the names in the whole model; the projector, which is new, is not in them."""
    tower = CLIPVisionModel.from_pretrained(parts / "clip")
    decoder: Any = AutoModelForCausalLM.from_pretrained(parts / name)
    found = {f"model.vision_tower.{key}": weight for key, weight in tower.named_parameters()}
    found |= {f"{TEXT}{key}": weight for key, weight in decoder.base_model.named_parameters()}
    found |= {f"lm_head.{key}": weight for key, weight in decoder.get_output_embeddings().named_parameters()}
    return {key: weight.detach().bfloat16() for key, weight in found.items()}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.timeout(600)
def test_losses_are_finite_and_every_step_is_taken(name: str, runs: Runs) -> None:
    for number, stage in enumerate(STAGES, 1):
        lines = (runs[0] / name / f"{number}_{stage}" / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        assert [line["step"] for line in logged] == [1, 2, 3]
        assert all(math.isfinite(line["train/loss"]) and line["train/gradient_norm"] > 0 for line in logged)
        assert math.isfinite(logged[-1]["eval/loss"])
        assert (logged[-1]["train/aux_loss"] > 0) == (stage == "experts")


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.timeout(600)
def test_each_stage_moves_what_it_trains_and_nothing_else(name: str, runs: Runs, parts: Path) -> None:
    layers = [f"{TEXT}layers.{index}.mlp" for index in range(0, NUM_LAYERS, 2)]
    trained = {
        "projector": (PROJECTOR,),
        "language": (PROJECTOR, TEXT, "lm_head."),
        "experts": tuple(f"{layer}.{part}." for layer in layers for part in ("experts", "router")),
    }
    before = pretrained(parts, name)
    for number, stage in enumerate(STAGES, 1):
        model = dm.load_model(runs[0] / name / f"{number}_{stage}" / "model")
        after = weights(model)
        assert set(moe_layers(model)) == (set(layers) if stage == "experts" else set())
        for key, weight in after.items():
            if key not in before:
                assert key.startswith(trained[stage]) and stage != "language", f"{key} is new in stage {stage}"
            elif not key.startswith(trained[stage]):
                assert torch.equal(weight, before[key]), f"stage {stage} changed {key}"
            elif weight.dim() > 1 and "embed_tokens" not in key:  # norms are too near 1 for it
                assert not torch.equal(weight, before[key]), f"stage {stage} left {key} as it was"
        if stage == "experts":
            copied, first = before[f"{layers[0]}.{FFN[name]}"].float(), after[f"{layers[0]}.experts.w1"].float()
            *two, grown = (first - copied).abs().amax((1, 2))
            assert 0 < max(two) < 1e-3 < grown, "copies of the FFN, and one of them grown after two steps, with noise"
        before = after


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.timeout(600)
def test_what_is_frozen_has_neither_masters_nor_moments(name: str, runs: Runs) -> None:
    for number, stage in enumerate(STAGES):
        ranks = [of_rank[name][number] for of_rank in runs[1]]
        assert {(*held.dtypes, held.zero_stage) for held in ranks} == {(torch.bfloat16, 2)}
        trained, frozen, masters = (sum(getattr(h, key) for h in ranks) for key in ("trained", "frozen", "masters"))
        assert frozen > 10 * PADDING, "or it would not show"
        assert trained <= masters < trained + PADDING, stage
        for held in ranks:
            assert held.moments == {"exp_avg": held.masters, "exp_avg_sq": held.masters}, stage
