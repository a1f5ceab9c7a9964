"""Values that are right by themselves and impossible together, all found at once, before any process group exists.

Each check is a function whose parameters are the sections it needs, so that a section which could not be built leaves
the checks on all others standing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TelemetryConfig,
    TrainingConfig,
)

# The tokenizer of dynmoe_ds.data, which may not be imported here: 256 bytes and the end of text.
MIN_VOCAB_SIZE = 257


def find_faults(config: RunConfig, *, check_run_dir: bool = True) -> list[str]:
    """One sentence per impossible value or combination, each with the values and what to do; empty when sound.

    check_run_dir: whether the run folder must be empty. Only the rank that creates it may ask: the others would see
    the files that the first rank has already written.
    """
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    return find_faults_in(sections, check_run_dir=check_run_dir)


def find_faults_in(sections: Mapping[str, Any], *, check_run_dir: bool = True) -> list[str]:
    """As `find_faults`, of the checks whose sections are all given."""
    faults: list[str] = []
    for check in _CHECKS:
        needed = inspect.signature(check).parameters
        if check is _run_dir and not check_run_dir:
            continue
        if all(name in sections for name in needed):
            faults.extend(check(**{name: sections[name] for name in needed}))
    return faults


def _at_least(section: str, values: object, least: int, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(values, name)
        if value < least:
            yield f"{section}.{name} is {value} but must be at least {least}."


def _multiple(name: str, value: int, of: str, base: int) -> Iterator[str]:
    """A fault unless `value` is a multiple of `base`, with the nearest values that are."""
    if base >= 1 and value >= 1 and value % base:
        below, above = value // base * base, (value // base + 1) * base
        nearest = f"{below} or {above}" if below else f"{above}"
        yield f"{name} is {value} but must be a multiple of {of}. Use {nearest}."


def _seed(seed: int) -> Iterator[str]:
    if not 0 <= seed < 2**63:
        yield f"seed is {seed} but must be at least 0 and below 2**63."


def _run_dir(run_dir: str) -> Iterator[str]:
    if not run_dir.strip():
        yield "run_dir is empty. Name a folder that does not exist yet, as in run_dir=runs/first."
        return
    path = Path(run_dir)
    if path.is_dir():
        if any(path.iterdir()):
            yield f"run_dir {run_dir!r} exists and is not empty. Choose another `run_dir`, or move that folder away."
    elif path.exists():
        yield f"run_dir {run_dir!r} exists and is not a folder. Choose another `run_dir`."


def _model(model: ModelConfig) -> Iterator[str]:
    yield from _at_least(
        "model", model, 1, "hidden_size", "num_layers", "num_heads", "dense_ffn_hidden_size", "expert_ffn_hidden_size",
        "num_slots",
    )  # fmt: skip
    if not 1 <= model.num_experts <= model.num_slots:
        yield (
            f"model.num_experts is {model.num_experts} but must be between 1 and model.num_slots ({model.num_slots}): "
            "every expert needs a slot. Lower the one or raise the other."
        )
    if not 1 <= model.moe_every <= model.num_layers:
        yield (
            f"model.moe_every is {model.moe_every} but must be between 1 and model.num_layers ({model.num_layers}), "
            "or no layer has experts."
        )
    heads = model.num_heads
    # Rotary position embeddings turn pairs of channels.
    yield from _multiple("model.hidden_size", model.hidden_size, f"2 x model.num_heads (2 x {heads})", 2 * heads)


def _parallel(parallel: ParallelConfig) -> Iterator[str]:
    yield from _at_least("parallel", parallel, 1, "num_ranks", "process_group_timeout_s")
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


def _slots(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    ep_size = parallel.ep_size
    if ep_size < 1 or parallel.num_ranks % ep_size:
        return  # _parallel asks for another ep_size, so advice for this one would mislead
    yield from _multiple("model.num_slots", model.num_slots, f"parallel.ep_size ({ep_size})", ep_size)


def _data(data: DataConfig) -> Iterator[str]:
    yield from _at_least("data", data, 2, "sequence_length", "held_out_every")
    if data.vocab_size < MIN_VOCAB_SIZE:
        yield (
            f"data.vocab_size is {data.vocab_size} but must be at least {MIN_VOCAB_SIZE}: 256 bytes and the end of "
            "text."
        )
    if data.name == "text_file":
        if data.path is None:
            yield "data.path is null but data.name is text_file. Name the file, as in data.path=book.txt."
        elif not Path(data.path).is_file():
            yield f"data.path is {data.path!r}, which is not a file here ({Path.cwd()}). Correct the path."
    elif data.path is not None:
        yield (
            f"data.path is {data.path!r} but data.name is {data.name}, which reads no file. Use data=text_file, or "
            "leave data.path null."
        )


def _optim(optim: OptimConfig) -> Iterator[str]:
    if not optim.lr > 0:
        yield f"optim.lr is {optim.lr} but must be above 0."
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        if not 0 <= beta < 1:
            yield f"optim.{name} is {beta} but must be at least 0 and below 1."
    yield from _at_least("optim", optim, 0, "weight_decay", "warmup_steps")
    if not 0 <= optim.final_lr_fraction <= 1:
        yield f"optim.final_lr_fraction is {optim.final_lr_fraction} but must be between 0 and 1."
    if not optim.gradient_clipping >= 0:
        yield f"optim.gradient_clipping is {optim.gradient_clipping} but must be at least 0; 0 turns clipping off."


def _training(training: TrainingConfig) -> Iterator[str]:
    yield from _at_least(
        "training", training, 1, "steps", "micro_batch_size", "gradient_accumulation_steps", "log_every_steps",
        "eval_every_steps", "eval_sequences",
    )  # fmt: skip
    yield from _at_least("training", training, 0, "sample_tokens")
    if training.sample_tokens > 0 and not training.sample_prompt:
        yield (
            f"training.sample_prompt is empty but training.sample_tokens is {training.sample_tokens}. Give a prompt, "
            "or set training.sample_tokens=0."
        )


def _warmup(optim: OptimConfig, training: TrainingConfig) -> Iterator[str]:
    if optim.warmup_steps >= training.steps >= 1:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps} but must be below training.steps ({training.steps}), or the "
            f"learning rate never falls. Use at most {training.steps - 1}, or train longer."
        )


def _adaptation(adaptation: AdaptationConfig | None, training: TrainingConfig) -> Iterator[str]:
    if adaptation is not None and adaptation.every_steps > training.steps:
        yield (
            f"adaptation.every_steps is {adaptation.every_steps} but training.steps is {training.steps}, so that no "
            "adaptation would ever happen. Lower adaptation.every_steps, or use adaptation=none."
        )


def _telemetry(telemetry: TelemetryConfig) -> Iterator[str]:
    if telemetry.wandb_mode != "disabled" and not telemetry.wandb_project.strip():
        yield (
            f"telemetry.wandb_project is empty but telemetry.wandb_mode is {telemetry.wandb_mode}. Name a project, or "
            "use telemetry=disabled."
        )


_CHECKS: tuple[Callable[..., Iterator[str]], ...] = (
    _seed, _run_dir, _model, _parallel, _slots, _data, _optim, _training, _warmup, _adaptation, _telemetry,
)  # fmt: skip
