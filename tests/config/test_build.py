"""Strict building: every kind of fault by its message, several at once, and what is converted."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dynmoe_ds.adaptation.config import AdaptationConfig
from dynmoe_ds.config.build import build, build_sections
from dynmoe_ds.config.schema import TextDataConfig, TokenShardsConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import TopAnyConfig

PLAIN: dict[str, Any] = {
    "seed": 0,
    "run_dir": "runs/never-made-by-a-test",
    "model": {
        "name": "llama",
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dense_ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64,
        "moe_every": 2,
        "num_experts": 4,
        "num_slots": 8,
    },
    "expert": {"kind": "swiglu"},
    "router": {"name": "top_any_recommended", "temperature": 3.0},
    "adaptation": {"every_steps": 10, "window_steps": 5},
    "data": {"name": "pydoc_topics", "vocab_size": 512, "sequence_length": 32, "held_out_every": 10},
    "optim": {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.01,
        "warmup_steps": 5,
        "final_lr_fraction": 0.1,
        "gradient_clipping": 1.0,
    },
    "parallel": {
        "num_ranks": 2,
        "ep_size": 2,
        "zero_stage": 2,
        "dtype": "float32",
        "activation_checkpointing": "none",
        "process_group_timeout_s": 60,
    },
    "training": {
        "steps": 20,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "log_every_steps": 5,
        "eval_every_steps": 10,
        "eval_sequences": 8,
        "sample_prompt": "The ",
        "sample_tokens": 10,
    },
    "telemetry": {"wandb_mode": "disabled", "wandb_project": "dynmoe"},
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """The plain configuration with one value set."""
    plain = copy.deepcopy(PLAIN)
    *sections, key = path.split(".")
    place = plain
    for section in sections:
        place = place[section]
    place[key] = value
    return plain


def faults_of(plain: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        build(plain)
    return caught.value.faults


def test_a_sound_configuration_becomes_typed() -> None:
    config = build(PLAIN)
    assert config.model.num_slots == 8
    assert config.adaptation == AdaptationConfig(every_steps=10, window_steps=5)
    assert config.data.path is None, "a field with a default may be left out"


def test_router_is_the_preset_with_the_given_fields_replaced() -> None:
    router = build(PLAIN).router
    assert isinstance(router, TopAnyConfig)
    assert router.temperature == 3.0
    recommended = TopAnyConfig.recommended()
    assert (router.weighting, router.price_weight) == (recommended.weighting, recommended.price_weight)
    assert router != recommended


def test_null_adaptation_is_none_and_null_elsewhere_is_refused() -> None:
    assert build(with_value("adaptation", None)).adaptation is None
    assert faults_of(with_value("optim", None))[0].startswith("optim is None but must be a section with the keys lr,")


def test_a_whole_number_is_a_number_but_nothing_else_is_converted() -> None:
    lr = build(with_value("optim.lr", 1)).optim.lr
    assert lr == 1.0 and type(lr) is float


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.steps", "many", "training.steps is 'many' (text) but must be a whole number."),
        ("training.steps", "20", "training.steps is '20' (text) but must be a whole number."),
        ("training.steps", 20.0, "training.steps is 20.0 (a number) but must be a whole number."),
        ("training.steps", True, "training.steps is True (true or false) but must be a whole number."),
        ("training.steps", None, "training.steps is None (null) but must be a whole number."),
        ("optim.lr", True, "optim.lr is True (true or false) but must be a number."),
        ("optim.lr", float("nan"), "optim.lr is nan but must be a finite number."),
        ("training.sample_prompt", 3, "training.sample_prompt is 3 (a whole number) but must be text."),
        ("data.path", 3, "data.path is 3 (a whole number) but must be text."),
        ("seed", {"x": 1}, "seed is {'x': 1} (a section) but must be a whole number."),
        (
            "expert.kind",
            "swigul",
            "expert.kind is 'swigul'. Did you mean 'swiglu'? Use swiglu, geglu, geglu_tanh, gelu, gelu_tanh or "
            "quick_gelu.",
        ),
        ("parallel.dtype", 16, "parallel.dtype is 16. Use float32 or bfloat16."),
        ("adaptation.last_growth_step", 1.5, "adaptation.last_growth_step is 1.5 (a number) but must be a whole"),
        ("model.hiden_size", 64, "There is no key 'model.hiden_size'. Did you mean 'model.hidden_size'?"),
        ("expert.zzz", 1, "There is no key 'expert.zzz'. The keys there are kind."),
        ("router.temprature", 1.0, "There is no key 'router.temprature'. Did you mean 'router.temperature'?"),
        ("router.temperature", "hot", "router.temperature is 'hot' (text) but must be a number."),
        ("router.weighting", "avarage", "router.weighting is 'avarage'. Did you mean 'average'? Use average or"),
        ("router.temperature", 0.0, "router.temperature is 0.0 but must be above 0."),
        ("router", "top_any", "router is 'top_any' but must be a section with a name (expert_threshold"),
        ("router.name", "topany", "router.name is 'topany', which is no registered router. Did you mean 'top_any'?"),
        ("adaptation.window_steps", 11, "adaptation.window_steps is 11 but must be between 1 and"),
        ("data.name", "text_fil", "data.name is 'text_fil'. Did you mean 'text_file'? Use pydoc_topics, text_file"),
        ("data.name", 3, "data.name is 3. Use pydoc_topics, text_file"),
        ("data", "book.txt", "data is 'book.txt' but must be a section with a name (pydoc_topics, text_file"),
        ("model.name", "lama", "model.name is 'lama'. Did you mean 'llama'? Use "),
        ("model", None, "model is None but must be a section with a name ("),
        ("data.held_out_windows", 2, "There is no key 'data.held_out_windows'. Did you mean 'data.held_out_every'?"),
    ],
)
def test_each_fault_is_one_sentence_with_the_value(path: str, value: Any, message: str) -> None:
    faults = faults_of(with_value(path, value))
    assert len(faults) == 1, faults
    assert faults[0].startswith(message), faults[0]


def test_the_name_of_a_section_chooses_its_kind() -> None:
    shards = {"name": "token_shards", "path": "shards", "sequence_length": 8, "held_out_windows": None}
    plain = with_value("data", {**shards, "held_out_shards": ["a.bin"]})
    assert build(plain).data == TokenShardsConfig(
        path="shards", sequence_length=8, held_out_windows=None, held_out_shards=("a.bin",)
    )
    assert isinstance(build(PLAIN).data, TextDataConfig)
    of_the_other_kind = faults_of(with_value("data", {**shards, "vocab_size": 300}))
    assert of_the_other_kind == (
        "There is no key 'data.vocab_size'. The keys there are name, path, sequence_length, held_out_windows, "
        "held_out_shards.",
    )


def test_missing_keys_and_sections_are_named() -> None:
    plain = copy.deepcopy(PLAIN)
    del plain["optim"]["lr"], plain["telemetry"], plain["router"]["name"], plain["seed"]
    del plain["data"]["name"], plain["model"]
    faults = faults_of(plain)
    assert "optim.lr is missing. Give it a number." in faults
    assert (
        "telemetry is missing. Give it a section with the keys wandb_mode, wandb_project, tensorboard, detail."
        in faults
    )
    assert "seed is missing. Give it a whole number." in faults
    assert any(fault.startswith("router.name is missing. Use expert_threshold") for fault in faults)
    assert any(fault.startswith("data.name is missing. Give it pydoc_topics, text_file") for fault in faults)
    assert any(fault.startswith("model is missing. Give it a section with a name (") for fault in faults)
    assert len(faults) == 6


def test_all_faults_are_reported_at_once() -> None:
    plain = with_value("model.hiden_size", 1)
    plain["training"]["steps"] = "many"
    plain["router"]["temperature"] = -1.0
    plain["adaptation"].update(every_steps=0, noise=-1.0)
    plain["extra"] = 1
    del plain["parallel"]["dtype"]
    faults = faults_of(plain)
    starts = ("There is no key 'extra'", "There is no key 'model.hiden_size'", "training.steps", "router.temperature")
    for start in (*starts, "adaptation.every_steps", "adaptation.window_steps", "adaptation.noise", "parallel.dtype"):
        assert sum(fault.startswith(start) for fault in faults) == 1, (start, faults)
    assert len(faults) == 8


def test_sound_sections_survive_the_faults_of_others() -> None:
    built = build_sections(with_value("training.steps", "many"))
    assert "training" not in built.sections
    assert built.sections["model"].hidden_size == 64
    unknown_key = build_sections(with_value("model.hiden_size", 1))
    assert unknown_key.sections["model"].hidden_size == 64, "an unknown key does not hide the section from later checks"
