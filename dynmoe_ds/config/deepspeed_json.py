"""A run's configuration in DeepSpeed's words."""

from __future__ import annotations

from typing import Any

from dynmoe_ds.config.schema import RunConfig

# DeepSpeed prints a line of its own every so many steps; ours come from telemetry.
_NEVER = 10**9


def to_deepspeed(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: batch, ZeRO, precision, clipping and AdamW. No scheduler: the Trainer sets the rate.

    Clipping is always written out, because DeepSpeed 0.19 clips to 1.0 where nothing is said. Weight decay is 0 here
    and comes with the parameter groups, so that thresholds and norms have none.
    """
    zero: dict[str, Any] = {"stage": config.parallel.zero_stage}
    if config.parallel.zero_stage == 2:
        zero |= {"reduce_scatter": True, "contiguous_gradients": True, "overlap_comm": False}
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": config.training.gradient_accumulation_steps,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.parallel.dtype == "bfloat16"},
        "gradient_clipping": config.optim.gradient_clipping,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.optim.lr,
                "betas": [config.optim.beta1, config.optim.beta2],
                "eps": 1e-8,
                "weight_decay": 0.0,
                # DeepSpeed's own must be compiled; `dynmoe_ds.initialize(adam=...)` may choose another one.
                "torch_adam": True,
            },
        },
        "steps_per_print": _NEVER,
    }
