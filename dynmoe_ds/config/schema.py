"""The typed configuration of a run: what `dynmoe train` reads. Simple types only; one section per room.

Values that contradict one another are found by `dynmoe_ds.config.validate`, not here, so that all faults can be
reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.routing.router import RouterConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """The kind of expert: `swiglu` (as in Llama) or `gelu` (two layers with biases)."""

    kind: Literal["swiglu", "gelu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Llama-style decoder with random weights whose every `moe_every`-th MLP is a `MoELayer`.

    The MLP of layer i (from 0) is replaced when (i + 1) is a multiple of `moe_every`.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    dense_ffn_hidden_size: int
    expert_ffn_hidden_size: int
    moe_every: int
    num_experts: int
    num_slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Text for language modelling. `name` is `pydoc_topics` (comes with CPython) or `text_file` (`path` required)."""

    name: Literal["pydoc_topics", "text_file"]
    vocab_size: int
    sequence_length: int
    held_out_every: int
    path: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine fall to `final_lr_fraction` of `lr`. No decay on thresholds and norms."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    warmup_steps: int
    final_lr_fraction: float
    gradient_clipping: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Ranks, layout and precision. `process_group_timeout_s` bounds how long a rank waits for a dead one."""

    num_ranks: int
    ep_size: int
    zero_stage: int
    dtype: Literal["float32", "bfloat16"]
    activation_checkpointing: Literal["none", "torch", "deepspeed"]
    process_group_timeout_s: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The loop. One step is one optimiser step; `micro_batch_size` is sequences per rank and micro step."""

    steps: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    log_every_steps: int
    eval_every_steps: int
    eval_sequences: int
    sample_prompt: str
    sample_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """Where the numbers go beside the run folder's JSON lines."""

    wandb_mode: Literal["offline", "online", "disabled"]
    wandb_project: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run. `adaptation` None keeps the pool as it starts; `run_dir` is created and must be empty or absent."""

    seed: int
    run_dir: str
    model: ModelConfig
    expert: ExpertConfig
    router: RouterConfig
    adaptation: AdaptationConfig | None
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig
    training: TrainingConfig
    telemetry: TelemetryConfig
