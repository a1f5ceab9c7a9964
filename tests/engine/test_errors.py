"""Every error that a user of the engine can cause: on all ranks, in time, with words that help."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Decision, Grow, Move, Plan, Prune, Split, register_rule, rule_fault
from dynmoe_ds.errors import (
    CheckpointError,
    ConfigError,
    DivergenceError,
    DynMoEError,
    PlacementError,
    RoutingError,
    SurgeryError,
)
from dynmoe_ds.routing import router_config
from tests.helpers.models import HIDDEN, TinyModel, batch, deepspeed_config, train
from tests.helpers.spawn import run_ranks


def _message(error_type: type[Exception], act: Any) -> str:
    try:
        act()
    except error_type as e:
        return str(e)
    return f"no {error_type.__name__}"


def _differing(rank: int, world_size: int) -> list[str]:
    odd = rank == world_size - 1
    return [
        _message(DivergenceError, lambda: dm.initialize(TinyModel(2), deepspeed_config(2, lr=1e-2 if odd else 1e-3))),
        _message(DivergenceError, lambda: dm.initialize(TinyModel(2, num_slots=16 if odd else 8), deepspeed_config(2))),
        _message(DivergenceError, lambda: dm.initialize(TinyModel(1 if odd else 2), deepspeed_config(2))),
        _message(
            DivergenceError,
            lambda: dm.initialize(TinyModel(2), deepspeed_config(2), dm.AdaptationConfig(4, 4 if odd else 2)),
        ),
        _message(
            DynMoEError,
            lambda: dm.initialize(
                TinyModel(2), {**deepspeed_config(2), "fp16": {"enabled": True}} if odd else deepspeed_config(2)
            ),
        ),
        _message(
            DynMoEError,
            lambda: dm.initialize(TinyModel(2), {**deepspeed_config(2), "bf16": 3} if odd else deepspeed_config(2)),
        ),
    ]


def test_a_rank_with_another_configuration_is_an_error_on_every_rank() -> None:
    start = time.monotonic()
    results = run_ranks(_differing, 4, timeout_s=40)
    assert time.monotonic() - start < 40
    expected = [
        ("deepspeed.optimizer", '"lr": 0.01', "rank 3", "rank 0, 1, 2"),
        ("moe.0.num_slots is 8 on rank 0, 1, 2, 16 on rank 3.",),
        ("moe.1.ep_size is 2 on rank 0, 1, 2, 1 on rank 3.",),
        ("adaptation.window_steps is 2 on rank 0, 1, 2, 4 on rank 3.",),
        ("fp16",),
        ("bf16 is 3 in DeepSpeed's configuration",),
    ]
    for messages in results:
        for message, words in zip(messages, expected, strict=True):
            assert all(word in message for word in words), (words, message)
    assert "Another rank failed" in results[0][4] and "rank 3" in results[0][4]


@register_rule("fails_on_rank_1")
def _fails(records: Any, placement: Any, config: Any) -> Decision:
    if torch.distributed.get_rank() == 1:
        raise ValueError("the user's own rule")
    return Decision(pruned_ids=(), new_gate_row=None)


@register_rule("differs_on_rank_1")
def _differs(records: Any, placement: Any, config: Any) -> Decision:
    ids = placement.live_ids[:1] if torch.distributed.get_rank() == 1 else ()
    return Decision(pruned_ids=ids, new_gate_row=None)


def _bad_rule(rank: int, world_size: int, rule: str) -> tuple[str, Any]:
    engine = dm.initialize(TinyModel(2), deepspeed_config(1), dm.AdaptationConfig(2, 2, rule=rule))
    before = engine.placements()
    message = _message((ValueError, DivergenceError), lambda: train(engine, range(2), rank, world_size))  # type: ignore[arg-type]
    return message, before == engine.placements()


def test_a_rule_that_fails_on_one_rank_ends_all_ranks() -> None:
    (first, _), (second, _) = run_ranks(_bad_rule, 2, "fails_on_rank_1", timeout_s=40)
    assert "rank 1: ValueError: the user's own rule" in first
    assert second == "the user's own rule"


def test_plans_that_differ_change_nothing_anywhere() -> None:
    for message, is_unchanged in run_ranks(_bad_rule, 2, "differs_on_rank_1", timeout_s=40):
        assert "disagree on the plan" in message and '"kind": "prune"' in message and "rank 1" in message
        assert is_unchanged


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum()


def _written(folder: str, text: str) -> Path:
    path = Path(folder) / "given.json"
    path.write_text(text)
    return path


def _frozen_experts() -> TinyModel:
    model = TinyModel(1)
    for layer in model.moe:
        layer.experts.requires_grad_(False)
    return model


def _user_errors(rank: int, world_size: int, folder: str) -> dict[str, str]:
    def config(**zero: Any) -> dict[str, Any]:
        base = deepspeed_config(2)
        return {**base, "zero_optimization": {**base["zero_optimization"], **zero}}

    def start(settings: Any, model: nn.Module | None = None, adaptation: Any = None) -> Any:
        return lambda: dm.initialize(model or TinyModel(1), settings, adaptation)

    broken = Path(folder) / "broken.json"
    broken.write_text("{")
    frozen = TinyModel(1).requires_grad_(False)
    offload = {"device": "cpu"}
    out = {
        "stage": _message(ConfigError, start(config(stage=7))),
        "fp16": _message(ConfigError, start({**config(), "fp16": {"enabled": True}})),
        "offload": _message(ConfigError, start(config(offload_optimizer=offload, offload_param=offload))),
        "hpz": _message(ConfigError, start(config(stage=3, zero_hpz_partition_size=2))),
        "quantized": _message(ConfigError, start(config(stage=3, zero_quantized_gradients=True))),
        "sequence": _message(ConfigError, start({**config(stage=3), "sequence_parallel_size": 2})),
        "no layer": _message(ConfigError, start(config(), _Plain(), dm.AdaptationConfig(1, 1))),
        "rule": _message(ConfigError, start(config(), None, dm.AdaptationConfig(1, 1, rule="none"))),
        "served": _message(ConfigError, start(config(), TinyModel(1, router="top_k"), dm.AdaptationConfig(1, 1))),
        "missing": _message(ConfigError, start(f"{folder}/nothing.json")),
        "broken": _message(ConfigError, start(broken)),
        "frozen": _message(ConfigError, start(config(), frozen)),
    }
    out |= {
        "bad stage": _message(ConfigError, start(config(stage="two"))),
        "bad section": _message(ConfigError, start({**config(), "zero_optimization": 2})),
        "no JSON": _message(ConfigError, start({**config(), "optimizer": {"type": nn.Linear}})),
        "no dictionary": _message(ConfigError, start(_written(folder, "[1]"))),
        "accumulation": _message(
            ConfigError, start({**deepspeed_config(0, bf16=True), "data_types": {"grad_accum_dtype": "fp32"}})
        ),
        "frozen and adapting": _message(ConfigError, start(config(), _frozen_experts(), dm.AdaptationConfig(1, 1))),
        "frozen experts": _message(ConfigError, start(config(), _frozen_experts())),
    }
    model = TinyModel(1)
    model.moe[0].ep_size = 3
    out["ep_size"] = _message(ConfigError, start(config(), model))
    with deepspeed.zero.Init(config_dict_or_path={**config(stage=3), "train_batch_size": 1}):
        out["zero.Init"] = _message(ConfigError, lambda: TinyModel(1))

    engine = dm.initialize(TinyModel(1), {**config(), "gradient_clipping": None})
    x, y = batch(0, 8)
    engine(x, y)
    out["no backward"] = _message(RoutingError, engine.step)
    out["save"] = _message(CheckpointError, lambda: engine.save_checkpoint(folder))
    out["load"] = _message(CheckpointError, lambda: engine.load_checkpoint(folder))
    out["16bit"] = _message(CheckpointError, lambda: engine.save_16bit_model(folder))
    prune = Plan(items=tuple(Prune(layer="moe.0", expert_id=i) for i in range(4)))
    out["last expert"] = _message(PlacementError, lambda: engine.apply_plan(prune))
    move = Plan(items=(Move(layer="moe.0", expert_id=0, to_slot=2),))
    out["taken slot"] = _message(PlacementError, lambda: engine.apply_plan(move))
    row = torch.ones(HIDDEN, dtype=torch.float64) / HIDDEN**0.5

    def grow(at: Any = engine, **changes: Any) -> Any:
        fields = {"layer": "moe.0", "expert_id": 4, "slot": 1, "gate_row": row, "seeding": "fresh", "parent_id": None}
        prune = Prune(layer="moe.1", expert_id=0)  # comes first, and must not happen when what follows cannot
        return lambda: at.apply_plan(Plan(items=(prune, Grow(**(fields | changes)))))

    out["no adaptation"] = _message(SurgeryError, grow())
    split = Split(layer="moe.0", parent_id=0, expert_id=4, slot=1)
    out["split without adaptation"] = _message(SurgeryError, lambda: engine.apply_plan(Plan(items=(split,))))
    adapting = dm.initialize(TinyModel(1), config(), dm.AdaptationConfig(9, 9))
    adapting.backward(adapting(x, y))
    adapting.step()
    out["seeding"] = _message(SurgeryError, grow(adapting, seeding="copy_neerest"))
    out["no parent"] = _message(SurgeryError, grow(adapting, seeding="copy_most_loaded"))
    out["dead parent"] = _message(PlacementError, grow(adapting, seeding="copy_most_loaded", parent_id=9))
    out["gate row"] = _message(SurgeryError, grow(adapting, gate_row=row[:3]))
    out["expert id"] = _message(PlacementError, grow(adapting, expert_id=9))
    out["layer"] = _message(PlacementError, grow(adapting, layer="moe.9"))
    out["nothing pruned"] = str(adapting.placements()["moe.1"].live_ids)
    out["unchanged"] = str(engine.placements()["moe.0"].live_ids)
    for name, function in {
        "torch reentrant": lambda f, h: checkpoint(f, h, use_reentrant=True),
        "deepspeed reentrant": deepspeed.checkpointing.checkpoint,
    }.items():
        reentrant = dm.initialize(TinyModel(1, checkpoint=function), config())
        out[name] = _message(RoutingError, lambda e=reentrant: e(x, y))  # type: ignore[misc]
    return out


EXPECTED = {
    "bad stage": "zero_optimization.stage is 'two'. Use 0, 1, 2 or 3.",
    "bad section": "zero_optimization is 2 in DeepSpeed's configuration but must be a dictionary",
    "no JSON": "holds a value that JSON cannot",
    "no dictionary": "must be a dictionary but is list",
    "accumulation": "data_types.grad_accum_dtype is fp32",
    "frozen and adapting": "moe.0: adaptation needs parameters that train, but experts.w1, experts.w3, experts.w2 are",
    "frozen experts": "moe.0: experts are frozen, which DeepSpeed cannot do at ZeRO-2. Use ZeRO-0 or 3.",
    "no adaptation": "needs an AdaptationConfig",
    "split without adaptation": "needs an AdaptationConfig",
    "seeding": "seeding is 'copy_neerest'. Use one of copy_nearest,",
    "no parent": "seeding is copy_most_loaded but parent_id is None",
    "dead parent": "Expert 9 is not live",
    "gate row": "gate_row has shape [3], not [16]",
    "expert id": "calls a new expert of moe.0 9, but the next id is 4",
    "layer": "There is no layer called 'moe.9'. Layers: moe.0, moe.1.",
    "nothing pruned": "(0, 1, 2, 3)",
    "stage": "zero_optimization.stage is 7. Use 0, 1, 2 or 3.",
    "fp16": "Use bf16",
    "offload": "zero_optimization.offload_param is set",
    "hpz": "zero_hpz_partition_size",
    "quantized": "zero_quantized_gradients",
    "sequence": "sequence_parallel_size",
    "no layer": "the model has no MoELayer",
    "rule": "adaptation.rule is 'none'. Use one of",
    "served": "adaptation.rule is paper, which adds an expert when tokens choose none, but with TopKConfig every token",
    "missing": "nothing.json cannot be read: No such file or directory",
    "broken": "broken.json is not valid JSON",
    "frozen": "No parameter requires a gradient",
    "ep_size": "moe.0: ep_size is 3 but there is one data-parallel rank",
    "zero.Init": "Build the model outside of it",
    "no backward": "Call engine.backward(loss), not loss.backward()",
    "save": "in the middle of an optimiser step",
    "load": "in the middle of an optimiser step",
    "16bit": "engine.save_16bit_model is DeepSpeed's own",
    "last expert": "is the last live expert and cannot be pruned",
    "taken slot": "Slot 2 holds expert 1. Free slots: 1, 3, 5, 7.",
    "unchanged": "(0, 1, 2, 3)",
    "torch reentrant": "moe.0 runs inside a reentrant activation checkpoint",
    "deepspeed reentrant": "moe.0 runs inside a reentrant activation checkpoint",
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(_user_errors, 1, str(tmp_path_factory.mktemp("errors")))[0]


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_users_fault_is_named(messages: dict[str, str], fault: str) -> None:
    assert EXPECTED[fault] in messages[fault]


def test_a_rule_is_refused_in_the_words_of_the_configuration_once_for_all_layers(messages: dict[str, str]) -> None:
    assert messages["served"] == rule_fault(dm.AdaptationConfig(1, 1), router_config("top_k"))


def test_all_faults_are_reported_at_once(messages: dict[str, str]) -> None:
    assert "2 faults in the configuration" in messages["offload"]
