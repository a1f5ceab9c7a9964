"""The values of the vision-language recipes, against those of the papers and of their authors' scripts."""

from __future__ import annotations

import math

import pytest
from tests.helpers.vision_language import DATA

from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import LlavaDataConfig, LlavaModelConfig, RunConfig
from dynmoe_ds.routing import TopAnyConfig

# Table 2 of MoE-LLaVA (arXiv 2401.15947), and `scripts/v1/*/{pretrain,finetune,finetune_moe}.sh` of its repository:
# learning rate, samples per step of all ranks, samples of its one epoch, and `--train_modules` without its fault.
STAGES = {
    "projector": (1e-3, 256, 558_000, {"projector"}),
    "language": (2e-5, 128, 964_000, {"projector", "language_model"}),
    "experts": (2e-5, 128, 665_000, {"experts"}),
}
# The decoders' FFNs: `hidden_act` of their published configurations, and whether there is a gate.
EXPERTS = {"stablelm": "swiglu", "qwen": "swiglu", "phi": "gelu_tanh"}


@pytest.fixture(scope="module", params=[(recipe, stage) for recipe in EXPERTS for stage in STAGES], ids="-".join)
def named(request: pytest.FixtureRequest) -> tuple[str, str, RunConfig]:
    """A recipe, a stage, and its configuration as `dynmoe stages` makes it of what a user must name."""
    recipe, stage = request.param
    files = [f"data.{key}={name}" for key, name in DATA.items()]
    folders = ["model.vision_pretrained=clip", "model.text_pretrained=decoder"]
    overrides = [f"experiment=moe_llava_{recipe}", f"stage={stage}", "run_dir=never", *files, *folders]
    return recipe, stage, load_config(overrides, check_files=False)


@pytest.fixture
def recipe(named: tuple[str, str, RunConfig]) -> str:
    return named[0]


@pytest.fixture
def stage(named: tuple[str, str, RunConfig]) -> str:
    return named[1]


@pytest.fixture
def config(named: tuple[str, str, RunConfig]) -> RunConfig:
    return named[2]


def test_the_optimiser_and_its_schedule(config: RunConfig, stage: str) -> None:
    lr, _, _, _ = STAGES[stage]
    optim, steps = config.optim, config.training.steps
    assert optim.lr == lr
    assert (optim.lr_decay, optim.final_lr_fraction) == ("cosine", 0.0)
    assert abs(optim.warmup_steps - 0.03 * steps) < 1
    assert optim.weight_decay == 0.0
    # The scripts leave these to transformers' Trainer, whose defaults they are.
    assert (optim.beta1, optim.beta2, optim.gradient_clipping) == (0.9, 0.999, 1.0)


def test_the_batch_and_one_epoch(config: RunConfig, stage: str) -> None:
    _, global_batch, num_samples, _ = STAGES[stage]
    training, num_ranks = config.training, config.parallel.num_ranks
    assert num_ranks == 8, "as in the papers"
    assert training.micro_batch_size * training.gradient_accumulation_steps * num_ranks == global_batch
    assert math.isclose(training.steps * global_batch, num_samples, rel_tol=1e-3)


def test_what_is_trained_and_how(config: RunConfig, stage: str) -> None:
    _, _, _, trained = STAGES[stage]
    assert config.stage is not None and set(config.stage.trained) == trained
    assert config.stage.has_experts == (stage == "experts")
    assert (config.adaptation is None) == (stage != "experts")
    parallel, deepspeed = config.parallel, to_deepspeed(config)
    assert (parallel.zero_stage, parallel.dtype, parallel.activation_checkpointing) == (2, "bfloat16", "torch")
    assert deepspeed["zero_optimization"]["stage"] == 2 and deepspeed["bf16"]["enabled"] is True


def test_images_and_texts(config: RunConfig, stage: str) -> None:
    data = config.data
    assert isinstance(data, LlavaDataConfig)
    assert (data.image_size, data.sequence_length) == (336, 2048)
    assert data.template == ("plain" if stage == "projector" else "vicuna")
    assert data.group == (stage != "projector"), "--group_by_modality_length, but not of captions"


def test_the_experts(config: RunConfig, recipe: str) -> None:
    """DynMoE (arXiv 2405.14297): two experts of four places in every second layer, as MoE-LLaVA's `moe_mode=sparse`."""
    model = config.model
    assert isinstance(model, LlavaModelConfig)
    assert (model.moe_layers, model.num_experts, model.num_slots) == ("even", 2, 4)
    assert config.expert.kind == EXPERTS[recipe]
    assert isinstance(config.router, TopAnyConfig)
    # `--router_aux_loss_coef`. That they are summed over layers is the ledger's business, and tested there.
    weights = {name: weight for name, weight in config.router.aux_loss_weights().items() if weight}
    assert weights == {"diversity": 0.01, "simplicity": 0.01}
    if config.adaptation is not None:
        # The authors' code records 300 of every 900 forward passes; both numbers are ours.
        assert (config.adaptation.rule, config.adaptation.every_steps) == ("paper", 300)
