"""What DeepSpeed is told, value by value."""

from __future__ import annotations

import pytest

from dynmoe_ds.config.deepspeed_json import to_deepspeed
from dynmoe_ds.config.load import load_config

RUN_DIR = "run_dir=runs/never-made-by-a-test"


def test_the_whole_dictionary_at_zero_2() -> None:
    config = load_config([RUN_DIR, "training.micro_batch_size=3", "training.gradient_accumulation_steps=5"])
    assert to_deepspeed(config) == {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 5,
        "zero_optimization": {
            "stage": 2, "reduce_scatter": True, "contiguous_gradients": True, "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True},
        },
        "steps_per_print": 10**9,
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_stages_are_only_named(stage: int) -> None:
    config = load_config([RUN_DIR, f"parallel.zero_stage={stage}"])
    assert to_deepspeed(config)["zero_optimization"] == {"stage": stage}


def test_bfloat16_and_no_clipping_are_said_explicitly() -> None:
    told = to_deepspeed(load_config([RUN_DIR, "parallel.dtype=bfloat16", "optim.gradient_clipping=0"]))
    assert told["bf16"] == {"enabled": True}
    assert told["gradient_clipping"] == 0.0, "unsaid, DeepSpeed would clip to 1.0"
    assert "scheduler" not in told and "fp16" not in told


def test_deepspeed_accepts_the_dictionary() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(to_deepspeed(load_config([RUN_DIR])))
    assert parsed.gradient_clipping == 1.0
    assert parsed.zero_optimization_stage == 2
    assert parsed.optimizer_params["torch_adam"] is True
