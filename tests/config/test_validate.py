"""Every impossible value or combination by its message, and all of them at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.run_config import changed

from dynmoe_ds.adaptation import rule_fault
from dynmoe_ds.config.data_faults import MIN_VOCAB_SIZE, SHARD_INDEX_FILE
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import MegatronIndexedConfig, RunConfig, TokenShardsConfig
from dynmoe_ds.config.validate import find_faults, find_faults_in
from dynmoe_ds.data.shard_index import INDEX_FILE
from dynmoe_ds.data.tokenizer import SMALLEST_VOCAB
from dynmoe_ds.routing import router_config


@pytest.fixture(scope="module")
def sound() -> RunConfig:
    return load_config(["run_dir=runs/never-made-by-a-test"])


def test_a_sound_configuration_has_no_faults(sound: RunConfig) -> None:
    assert find_faults(sound) == []


def test_what_is_known_of_the_data_room_is_so_there() -> None:
    assert MIN_VOCAB_SIZE == SMALLEST_VOCAB
    assert SHARD_INDEX_FILE == INDEX_FILE


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
        ({"model__shared_ffn_hidden_size": -1}, "model.shared_ffn_hidden_size is -1 but must be at least 0."),
        (
            {"model__moe_every": 5},
            "model.moe_every is 5 but must be between 1 and model.num_layers (4), or no layer has experts.",
        ),
        (
            {"model__moe_first": 4},
            "model.moe_first is 4 but must be at least 0 and below model.num_layers (4), or no layer has experts.",
        ),
        ({"model__moe_first": -1}, "model.moe_first is -1 but must be at least 0 and below model.num_layers (4)"),
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
            {"adaptation__first_step": 301},
            "adaptation.first_step is 301 but training.steps is 300, so that no adaptation would ever happen. Lower "
            "adaptation.first_step, or use adaptation=none.",
        ),
        ({"training__eval_sequences": 0}, "training.eval_sequences is 0 but must be at least 1."),
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
        {"model__moe_first": 0},
        {"model__moe_first": 3},
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


def test_a_text_file_is_looked_for_only_where_it_is_read(sound: RunConfig) -> None:
    config = changed(sound, data__name="text_file", data__path="no/such.txt")
    assert len(find_faults(config)) == 1
    assert find_faults(config, check_files=False) == [], "the machine of another rank may lack the file"
    config = changed(sound, data__name="text_file")
    assert find_faults(config, check_files=False)[0].startswith("data.path is null"), "what is no file is seen anywhere"


def shards(path: str | None, **changes: Any) -> TokenShardsConfig:
    values = {"path": path, "sequence_length": 8, "held_out_windows": 1, **changes}
    return TokenShardsConfig(**values)


def test_a_folder_with_an_index_of_shards_passes(sound: RunConfig, tmp_path: Path) -> None:
    (tmp_path / SHARD_INDEX_FILE).write_text("{}")
    assert find_faults(changed(sound, data=shards(str(tmp_path)))) == []
    named = shards(str(tmp_path), held_out_windows=None, held_out_shards=("a.bin",))
    assert find_faults(changed(sound, data=named)) == []


def test_a_folder_of_shards_is_looked_for_only_where_rank_0_is(sound: RunConfig) -> None:
    elsewhere = changed(sound, data=shards("no/such"))
    assert find_faults(elsewhere)[0].startswith("data.path is 'no/such', which has no index.json here (")
    assert find_faults(elsewhere, check_files=False) == [], "loading tells the ranks together what is missing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "data.path is null. Name the folder that `dynmoe tokenize` wrote, as in data.path=shards."),
        ({"path": "no/such"}, "data.path is 'no/such', which has no index.json here ("),
        ({"sequence_length": 1}, "data.sequence_length is 1 but must be at least 2."),
        ({"held_out_windows": 0}, "data.held_out_windows is 0 but must be at least 1."),
        (
            {"held_out_windows": None},
            "data.held_out_windows is null and data.held_out_shards is empty, so that nothing would be held out. Set",
        ),
        (
            {"held_out_shards": ("a.bin",)},
            "data.held_out_windows is 1 and data.held_out_shards names a.bin, but only one of them can say what is "
            "held out. Set data.held_out_windows=null, or data.held_out_shards=[].",
        ),
    ],
)
def test_each_fault_of_token_shards(sound: RunConfig, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / SHARD_INDEX_FILE).write_text("{}")
    faults = find_faults(changed(sound, data=shards(changes.pop("path", str(tmp_path)), **changes)))
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults[0]


def indexed(folder: Path, **changes: Any) -> MegatronIndexedConfig:
    values = {"paths": (f"{folder}/books",), "tokenizer": str(folder), "sequence_length": 8, "held_out_fraction": 0.1}
    return MegatronIndexedConfig(**values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ()}, "data.paths is empty. Name what `dynmoe data index` wrote, as in"),
        ({"tokenizer": None}, "data.tokenizer is null. Name the folder of the tokenizer that made the data"),
        ({"tokenizer": "no/such"}, "data.tokenizer is 'no/such', which does not exist here ("),
        ({"weights": (0.5, 0.5)}, "data.weights has 2 numbers but data.paths 1 data sets. Give one weight for each"),
        ({"weights": (-0.5,)}, "data.weights has -0.5 but every weight must be above 0. Leave out"),
        ({"weights": (float("nan"),)}, "data.weights has nan but every weight must be above 0."),
        ({"held_out_fraction": 1.0}, "data.held_out_fraction is 1.0 but must be between 0 and 1."),
        ({"sequence_length": 1}, "data.sequence_length is 1 but must be at least 2."),
        ({"paths": ("no/such",)}, "data.paths needs no/such.idx, no/such.bin, which cannot be found here ("),
    ],
)
def test_each_fault_of_indexed_data(sound: RunConfig, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    for ending in (".idx", ".bin"):
        (tmp_path / f"books{ending}").write_text("")
    assert find_faults(changed(sound, data=indexed(tmp_path))) == []
    faults = find_faults(changed(sound, data=indexed(tmp_path, **changes)))
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults[0]


def test_a_run_folder_must_be_empty_where_it_is_made(
    sound: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(sound, run_dir=str(tmp_path))
    assert find_faults(config) == []
    (tmp_path / "owner.json").write_text("")
    assert find_faults(config) == [], "of a run that was killed before it wrote anything"
    (tmp_path / "metrics.jsonl").write_text("")
    assert find_faults(config) == [
        f"run_dir '{tmp_path}' exists and is not empty. Choose another `run_dir`, or move that folder away."
    ]
    launched, never = tmp_path / "launch", changed(sound, run_dir=str(tmp_path), checkpoint__resume="never")
    launched.mkdir()
    assert find_faults(config) == [], "a job that failed before its first checkpoint, and starts again"
    assert len(find_faults(never)) == 1
    (tmp_path / "metrics.jsonl").unlink()
    assert find_faults(never) == [], "a job that starts for the first time"
    launched.rmdir()
    (tmp_path / "metrics.jsonl").write_text("")
    assert find_faults(config, check_files=False) == [], "another rank may come after the first has begun to write"
    as_file = changed(sound, run_dir=str(tmp_path / "metrics.jsonl"))
    assert find_faults(as_file) == [
        f"run_dir '{as_file.run_dir}' exists and is not a folder. Choose another `run_dir`."
    ]
    below = changed(sound, run_dir=f"{as_file.run_dir}/a/b")
    assert find_faults(below) == [
        f"run_dir '{below.run_dir}' cannot be made: {as_file.run_dir} is not a folder. Choose another `run_dir`."
    ]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    closed = changed(sound, run_dir=f"{tmp_path}/a/b")
    assert find_faults(closed) == [
        f"run_dir '{closed.run_dir}' cannot be made: {tmp_path} may not be written. Choose another `run_dir`."
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


def test_a_rule_that_makes_no_sense_for_the_router_is_refused(sound: RunConfig) -> None:
    config = changed(sound, router=router_config("top_p"))
    (fault,) = find_faults(config)
    assert fault == rule_fault(config.adaptation, config.router)
    assert fault.startswith(
        "adaptation.rule is paper, which adds an expert when tokens choose none, but with TopPConfig every token has "
        "an expert. Use adaptation.rule="
    )
    for values in ({"adaptation__rule": "split_all"}, {"adaptation__last_growth_step": 0}, {"adaptation": None}):
        assert find_faults(changed(config, **values)) == []
    (fault,) = find_faults(changed(sound, adaptation__rule="pepper"))
    assert fault.startswith("adaptation.rule is 'pepper'. Use one of ") and "paper, split_all, split_loaded" in fault
