"""Values that are right by themselves and impossible together, all found at once, before any process group exists.

Each check is a function whose parameters are the sections it needs, so that a section which could not be built leaves
the checks on all others standing.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dynmoe_ds.adaptation import AdaptationConfig, rule_fault
from dynmoe_ds.config import data_faults, model_faults
from dynmoe_ds.config.bounds import at_least, multiple
from dynmoe_ds.config.schema import (
    CheckpointConfig,
    DataConfig,
    GlueDataConfig,
    ImageFolderConfig,
    LlavaDataConfig,
    LlavaModelConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TelemetryConfig,
    TrainingConfig,
)
from dynmoe_ds.routing import RouterConfig

# Of dynmoe_ds.telemetry, which may not be imported here.
CHECKPOINT_FOLDER = "checkpoints"
OWNER_FILE = "owner.json"
# Of dynmoe_ds.launching: made before the run, which is its own, started once or again.
LAUNCH_FOLDER = "launch"

NO_STAGE = "model.name is llava but there is no stage. Choose one: stage=projector, language or experts."


def find_faults(config: RunConfig, *, check_files: bool = True) -> list[str]:
    """One sentence per impossible value or combination, each with the values and what to do; empty when sound.

    check_files: whether to look at the files that rank 0 alone reads and writes. Only rank 0 may ask: the others may be
    on machines without the text, and would see what rank 0 has already written into the run folder.
    """
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    return find_faults_in(sections, check_files=check_files)


def find_faults_in(sections: Mapping[str, Any], *, check_files: bool = True) -> list[str]:
    """As `find_faults`, of the checks whose sections are all given."""
    faults: list[str] = []
    for check in _CHECKS:
        needed = inspect.signature(check).parameters
        if check in _CHECKS_OF_FILES and not check_files:
            continue
        if all(name in sections for name in needed):
            faults.extend(check(**{name: sections[name] for name in needed}))
    return faults


def _seed(seed: int) -> Iterator[str]:
    if not 0 <= seed < 2**63:
        yield f"seed is {seed} but must be at least 0 and below 2**63."


def _run_dir(run_dir: str, checkpoint: CheckpointConfig) -> Iterator[str]:
    if not run_dir.strip():
        yield "run_dir is empty. Name a folder that does not exist yet, as in run_dir=runs/first."
        return
    path = Path(run_dir)
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        is_resumed = checkpoint.resume == "auto" and not names.isdisjoint((CHECKPOINT_FOLDER, LAUNCH_FOLDER))
        if names - {LAUNCH_FOLDER, OWNER_FILE} and not is_resumed:
            yield f"run_dir {run_dir!r} exists and is not empty. Choose another `run_dir`, or move that folder away."
    elif path.exists():
        yield f"run_dir {run_dir!r} exists and is not a folder. Choose another `run_dir`."
    else:
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            why = "may not be written" if above.is_dir() else "is not a folder"
            yield f"run_dir {run_dir!r} cannot be made: {above} {why}. Choose another `run_dir`."


def _checkpoint(checkpoint: CheckpointConfig) -> Iterator[str]:
    yield from at_least("checkpoint", checkpoint, 1, "keep")
    if checkpoint.every_steps is not None:
        yield from at_least("checkpoint", checkpoint, 1, "every_steps")


def _sample_for_data(data: DataConfig, training: TrainingConfig) -> Iterator[str]:
    if training.sample_tokens > 0 and isinstance(data, GlueDataConfig | ImageFolderConfig | LlavaDataConfig):
        yield (
            f"training.sample_tokens is {training.sample_tokens} but data.name is {data.name}, from which no model "
            "learns to write. Set training.sample_tokens=0."
        )


def _parallel(parallel: ParallelConfig) -> Iterator[str]:
    yield from at_least("parallel", parallel, 1, "num_ranks", "process_group_timeout_s")
    if not 0 <= parallel.zero_stage <= 3:
        yield f"parallel.zero_stage is {parallel.zero_stage}. Use 0, 1, 2 or 3."
    if parallel.zero_stage == 3 and parallel.activation_checkpointing == "deepspeed":
        yield (
            "parallel.activation_checkpointing is deepspeed and parallel.zero_stage is 3, which DeepSpeed cannot do "
            "together. Use parallel.activation_checkpointing=torch, or a lower ZeRO stage."
        )
    ranks, ep_size = parallel.num_ranks, parallel.ep_size
    if ranks >= 1 and (ep_size < 1 or ranks % ep_size):
        *first, last = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        options = f"{', '.join(first)} or {last}" if first else last
        yield (
            f"parallel.ep_size is {ep_size} but must divide the {ranks} {'ranks' if ranks > 1 else 'rank'} of "
            f"parallel.num_ranks. Use {options}."
        )
    yield from parallel.dispatch.faults_with(max(ep_size, 1))


def _slots(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    ep_size = parallel.ep_size
    if ep_size < 1 or parallel.num_ranks % ep_size:
        return  # _parallel asks for another ep_size, so advice for this one would mislead
    yield from multiple("model.num_slots", model.num_slots, f"parallel.ep_size ({ep_size})", ep_size)


def _stage(model: ModelConfig, stage: StageConfig | None, adaptation: AdaptationConfig | None) -> Iterator[str]:
    if (stage is None) == isinstance(model, LlavaModelConfig):
        if stage is None:
            yield NO_STAGE
        else:
            yield f"stage is set but model.name is {model.name}, which is trained in one go. Use stage=none."
    if stage is None:
        return
    if not stage.trained:
        yield "stage.trained is empty, so that nothing would be trained. Name a part of the model."
    if "experts" in stage.trained and not stage.has_experts:
        yield "stage.trained names experts but stage.has_experts is false. Set stage.has_experts=true."
    if adaptation is not None and not stage.has_experts:
        yield "adaptation is set but stage.has_experts is false: there is nothing to adapt. Use adaptation=none."
    if stage.start is not None and not Path(stage.start).is_dir():
        yield (
            f"stage.start is {stage.start!r}, which is not a folder here ({Path.cwd()}). Name the folder `model` in "
            "the run folder of the stage before."
        )


def _optim(optim: OptimConfig) -> Iterator[str]:
    if not optim.lr > 0:
        yield f"optim.lr is {optim.lr} but must be above 0."
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        if not 0 <= beta < 1:
            yield f"optim.{name} is {beta} but must be at least 0 and below 1."
    yield from at_least("optim", optim, 0, "weight_decay", "warmup_steps")
    if not 0 <= optim.final_lr_fraction <= 1:
        yield f"optim.final_lr_fraction is {optim.final_lr_fraction} but must be between 0 and 1."
    if not optim.gradient_clipping >= 0:
        yield f"optim.gradient_clipping is {optim.gradient_clipping} but must be at least 0; 0 turns clipping off."


def _training(training: TrainingConfig) -> Iterator[str]:
    yield from at_least(
        "training", training, 1, "steps", "micro_batch_size", "gradient_accumulation_steps", "log_every_steps",
        "eval_every_steps",
    )  # fmt: skip
    if training.eval_sequences is not None:
        yield from at_least("training", training, 1, "eval_sequences")
    yield from at_least("training", training, 0, "sample_tokens")
    if training.sample_tokens > 0 and not training.sample_prompt:
        yield (
            f"training.sample_prompt is empty but training.sample_tokens is {training.sample_tokens}. Give a prompt, "
            "or set training.sample_tokens=0."
        )


def _roll_back(training: TrainingConfig, checkpoint: CheckpointConfig) -> Iterator[str]:
    if training.on_non_finite == "roll_back" and checkpoint.every_steps is None:
        yield (
            "training.on_non_finite is roll_back but checkpoint.every_steps is null, so that there is nothing to go "
            "back to. Set checkpoint.every_steps, or use training.on_non_finite=skip_step."
        )


def _warmup(optim: OptimConfig, training: TrainingConfig) -> Iterator[str]:
    if optim.warmup_steps >= training.steps >= 1:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps} but must be below training.steps ({training.steps}), or the "
            f"learning rate never falls. Use at most {training.steps - 1}, or train longer."
        )


def _adaptation(adaptation: AdaptationConfig | None, training: TrainingConfig) -> Iterator[str]:
    if adaptation is None:
        return
    name = "every_steps" if adaptation.first_step is None else "first_step"
    first = getattr(adaptation, name)
    if first > training.steps:
        yield (
            f"adaptation.{name} is {first} but training.steps is {training.steps}, so that no adaptation would ever "
            f"happen. Lower adaptation.{name}, or use adaptation=none."
        )


def _rule(adaptation: AdaptationConfig | None, router: RouterConfig) -> Iterator[str]:
    if adaptation is not None and (fault := rule_fault(adaptation, router)) is not None:
        yield fault


def _telemetry(telemetry: TelemetryConfig) -> Iterator[str]:
    if telemetry.wandb_mode != "disabled" and not telemetry.wandb_project.strip():
        yield (
            f"telemetry.wandb_project is empty but telemetry.wandb_mode is {telemetry.wandb_mode}. Name a project, or "
            "use telemetry=disabled."
        )


_CHECKS: tuple[Callable[..., Iterator[str]], ...] = (
    _seed, _run_dir, _checkpoint, *model_faults.CHECKS, _parallel, _slots, *data_faults.CHECKS,
    *data_faults.CHECKS_OF_FILES, _optim, _training, _roll_back, _sample_for_data, _warmup, _adaptation, _rule,
    _telemetry, _stage,
)  # fmt: skip
_CHECKS_OF_FILES = (_run_dir, *data_faults.CHECKS_OF_FILES)
