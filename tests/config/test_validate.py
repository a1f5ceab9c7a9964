"""Every impossible value or combination by its message, and all of them at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.config.validate import MIN_VOCAB_SIZE, find_faults, find_faults_in
from dynmoe_ds.data.tokenizer import SMALLEST_VOCAB


@pytest.fixture(scope="module")
def sound() -> RunConfig:
    return load_config(["run_dir=runs/never-made-by-a-test"])


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with values set: `model__num_experts=3`, or `seed=1`."""
    for name, value in values.items():
        section, _, key = name.partition("__")
        part = dataclasses.replace(getattr(config, section), **{key: value}) if key else value
        config = dataclasses.replace(config, **{section: part})
    return config


def test_a_sound_configuration_has_no_faults(sound: RunConfig) -> None:
    assert find_faults(sound) == []


def test_the_least_vocabulary_is_the_tokenizers() -> None:
    assert MIN_VOCAB_SIZE == SMALLEST_VOCAB


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"parallel__num_ranks": 8, "parallel__ep_size": 3},
            "parallel.ep_size is 3 but must divide the 8 ranks of parallel.num_ranks. Use 1, 2, 4 or 8.",
        ),
        (
            {"parallel__num_ranks": 1, "parallel__ep_size": 2},
            "parallel.ep_size is 2 but must divide the 1 rank of parallel.num_ranks. Use 1.",
        ),
        ({"parallel__ep_size": 0}, "parallel.ep_size is 0 but must divide the 2 ranks of parallel.num_ranks. Use 1 or"),
        ({"parallel__num_ranks": 0}, "parallel.num_ranks is 0 but must be at least 1."),
        ({"parallel__process_group_timeout_s": 0}, "parallel.process_group_timeout_s is 0 but must be at least 1."),
        ({"parallel__zero_stage": 4}, "parallel.zero_stage is 4. Use 0, 1, 2 or 3."),
        (
            {"parallel__zero_stage": 3, "parallel__activation_checkpointing": "deepspeed"},
            "parallel.activation_checkpointing is deepspeed and parallel.zero_stage is 3, which DeepSpeed cannot do",
        ),
        (
            {"model__num_slots": 15},
            "model.num_slots is 15 but must be a multiple of parallel.ep_size (2). Use 14 or 16.",
        ),
        (
            {"model__num_experts": 17},
            "model.num_experts is 17 but must be between 1 and model.num_slots (16): every expert needs a slot. "
            "Lower the one or raise the other.",
        ),
        ({"model__num_experts": 0}, "model.num_experts is 0 but must be between 1 and model.num_slots (16)"),
        (
            {"model__hidden_size": 130},
            "model.hidden_size is 130 but must be a multiple of 2 x model.num_heads (2 x 4). Use 128 or 136.",
        ),
        (
            {"model__hidden_size": 4},
            "model.hidden_size is 4 but must be a multiple of 2 x model.num_heads (2 x 4). Use",
        ),
        ({"model__num_heads": 0}, "model.num_heads is 0 but must be at least 1."),
        ({"model__expert_ffn_hidden_size": 0}, "model.expert_ffn_hidden_size is 0 but must be at least 1."),
        (
            {"model__moe_every": 5},
            "model.moe_every is 5 but must be between 1 and model.num_layers (4), or no layer has experts.",
        ),
        ({"data__vocab_size": 256}, "data.vocab_size is 256 but must be at least 257: 256 bytes and the end of text."),
        ({"data__held_out_every": 1}, "data.held_out_every is 1 but must be at least 2."),
        ({"data__sequence_length": 1}, "data.sequence_length is 1 but must be at least 2."),
        (
            {"data__name": "text_file"},
            "data.path is null but data.name is text_file. Name the file, as in data.path=book.txt.",
        ),
        (
            {"data__name": "text_file", "data__path": "no/such.txt"},
            "data.path is 'no/such.txt', which is not a file here (",
        ),
        (
            {"data__path": "book.txt"},
            "data.path is 'book.txt' but data.name is pydoc_topics, which reads no file. Use data=text_file, or leave "
            "data.path null.",
        ),
        ({"optim__lr": 0.0}, "optim.lr is 0.0 but must be above 0."),
        ({"optim__beta1": 1.0}, "optim.beta1 is 1.0 but must be at least 0 and below 1."),
        ({"optim__beta2": -0.1}, "optim.beta2 is -0.1 but must be at least 0 and below 1."),
        ({"optim__weight_decay": -0.1}, "optim.weight_decay is -0.1 but must be at least 0."),
        ({"optim__warmup_steps": -1}, "optim.warmup_steps is -1 but must be at least 0."),
        ({"optim__final_lr_fraction": 1.1}, "optim.final_lr_fraction is 1.1 but must be between 0 and 1."),
        (
            {"optim__gradient_clipping": -1.0},
            "optim.gradient_clipping is -1.0 but must be at least 0; 0 turns clipping off.",
        ),
        (
            {"optim__warmup_steps": 300},
            "optim.warmup_steps is 300 but must be below training.steps (300), or the learning rate never falls. Use "
            "at most 299, or train longer.",
        ),
        ({"training__micro_batch_size": 0}, "training.micro_batch_size is 0 but must be at least 1."),
        ({"training__log_every_steps": 0}, "training.log_every_steps is 0 but must be at least 1."),
        ({"training__eval_every_steps": -5}, "training.eval_every_steps is -5 but must be at least 1."),
        ({"training__sample_tokens": -1}, "training.sample_tokens is -1 but must be at least 0."),
        (
            {"training__sample_prompt": ""},
            "training.sample_prompt is empty but training.sample_tokens is 120. Give a prompt, or set "
            "training.sample_tokens=0.",
        ),
        (
            {"adaptation__every_steps": 301},
            "adaptation.every_steps is 301 but training.steps is 300, so that no adaptation would ever happen. Lower "
            "adaptation.every_steps, or use adaptation=none.",
        ),
        (
            {"telemetry__wandb_project": " "},
            "telemetry.wandb_project is empty but telemetry.wandb_mode is offline. Name a project, or use "
            "telemetry=disabled.",
        ),
        ({"seed": -1}, "seed is -1 but must be at least 0 and below 2**63."),
        ({"run_dir": ""}, "run_dir is empty. Name a folder that does not exist yet, as in run_dir=runs/first."),
    ],
)
def test_each_fault_by_its_message(sound: RunConfig, values: dict[str, Any], message: str) -> None:
    faults = find_faults(changed(sound, **values))
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults[0]


@pytest.mark.parametrize(
    "values",
    [
        {"parallel__num_ranks": 8, "parallel__ep_size": 4},
        {"model__num_experts": 16},
        {"model__moe_every": 1},
        {"optim__gradient_clipping": 0.0, "optim__warmup_steps": 0, "optim__final_lr_fraction": 1.0},
        {"training__sample_tokens": 0, "training__sample_prompt": ""},
        {"adaptation": None},
        {"adaptation__every_steps": 300},
        {"telemetry__wandb_mode": "online"},
        {"telemetry__wandb_mode": "disabled", "telemetry__wandb_project": ""},
        {"parallel__zero_stage": 3, "parallel__dtype": "bfloat16"},
        {"data__vocab_size": 257},
    ],
)
def test_what_is_possible_passes(sound: RunConfig, values: dict[str, Any]) -> None:
    assert find_faults(changed(sound, **values)) == []


def test_a_text_file_that_exists_passes(sound: RunConfig, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("once")
    assert find_faults(changed(sound, data__name="text_file", data__path=str(book))) == []


def test_a_run_folder_must_be_empty_where_it_is_made(sound: RunConfig, tmp_path: Path) -> None:
    config = changed(sound, run_dir=str(tmp_path))
    assert find_faults(config) == []
    (tmp_path / "metrics.jsonl").write_text("")
    assert find_faults(config) == [
        f"run_dir '{tmp_path}' exists and is not empty. Choose another `run_dir`, or move that folder away."
    ]
    assert find_faults(config, check_run_dir=False) == [], "another rank may come after the first has begun to write"
    as_file = changed(sound, run_dir=str(tmp_path / "metrics.jsonl"))
    assert find_faults(as_file) == [
        f"run_dir '{as_file.run_dir}' exists and is not a folder. Choose another `run_dir`."
    ]


def test_all_faults_are_found_at_once(sound: RunConfig) -> None:
    config = changed(sound, parallel__ep_size=3, model__num_experts=99, optim__lr=-1.0, training__steps=0, seed=-1)
    faults = find_faults(config)
    wrong = ("seed", "model.num_experts", "parallel.ep_size", "optim.lr", "training.steps", "adaptation.every_steps")
    for start in wrong:
        assert sum(fault.startswith(f"{start} is") for fault in faults) == 1, (start, faults)
    assert len(faults) == 6, faults


def test_checks_without_their_section_are_left_out(sound: RunConfig) -> None:
    parallel = changed(sound, parallel__zero_stage=9).parallel
    assert find_faults_in({"parallel": parallel}) == ["parallel.zero_stage is 9. Use 0, 1, 2 or 3."]
