"""A small run configuration that tests share, and how to change it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dynmoe_ds.adaptation import AdaptationConfig
from dynmoe_ds.config.schema import (
    ExpertConfig,
    LlamaModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TelemetryConfig,
    TextDataConfig,
    TrainingConfig,
)
from dynmoe_ds.routing import TopAnyConfig


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with values set: `model__num_experts=3`, or `seed=1`."""
    for name, value in values.items():
        section, _, key = name.partition("__")
        part = dataclasses.replace(getattr(config, section), **{key: value}) if key else value
        config = dataclasses.replace(config, **{section: part})
    return config


def small_run(run_dir: str | Path = "unused", **values: Any) -> RunConfig:
    """Twelve steps of four sequences on one rank: two layers, the second with 4 experts of 8 slots; then as `changed`.

    Logs at 5, 8, 10 and 12, evaluations at 8 and 12, adaptations at 4, 8 and 12.
    """
    config = RunConfig(
        seed=0,
        run_dir=str(run_dir),
        model=LlamaModelConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            dense_ffn_hidden_size=48,
            expert_ffn_hidden_size=32,
            moe_every=2,
            num_experts=4,
            num_slots=8,
        ),
        expert=ExpertConfig(kind="swiglu"),
        router=TopAnyConfig(),
        adaptation=AdaptationConfig(every_steps=4, window_steps=2, prune_below_share=0.95),
        data=TextDataConfig(name="pydoc_topics", vocab_size=400, sequence_length=24, held_out_every=10),
        optim=OptimConfig(
            lr=3e-3,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            warmup_steps=2,
            final_lr_fraction=0.1,
            gradient_clipping=1.0,
        ),
        parallel=ParallelConfig(
            num_ranks=1,
            ep_size=1,
            zero_stage=1,
            dtype="float32",
            activation_checkpointing="none",
            process_group_timeout_s=30,
        ),
        training=TrainingConfig(
            steps=12,
            micro_batch_size=4,
            gradient_accumulation_steps=1,
            log_every_steps=5,
            eval_every_steps=8,
            eval_sequences=5,
            sample_prompt="The ",
            sample_tokens=6,
        ),
        telemetry=TelemetryConfig(wandb_mode="disabled", wandb_project="none"),
    )
    return changed(config, **values)
