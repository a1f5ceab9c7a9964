import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.run_config import small_run
from tests.helpers.saved_model import saved_model_loss
from tests.helpers.spawn import run_ranks
from transformers import PreTrainedTokenizerFast

from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.errors import DynMoEError
from dynmoe_ds.telemetry import read_adaptation, read_experts, read_metrics
from dynmoe_ds.training import Trainer, trainer


def _config(run_dir: Path, **parallel) -> RunConfig:
    return small_run(run_dir, **{f"parallel__{key}": value for key, value in parallel.items()})


def _with_batch(config: RunConfig, micro: int, accumulation: int = 1) -> RunConfig:
    training = replace(config.training, micro_batch_size=micro, gradient_accumulation_steps=accumulation)
    return replace(config, training=training)


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    Trainer(config).run()


def _values(run_dir: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run_dir) if name in line}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    run_ranks(_train, 1, _config(run_dir))
    return run_dir


def test_the_run_folder_tells_the_run(one_rank):
    losses = _values(one_rank, "train/loss")
    assert list(losses) == [5, 8, 10, 12]
    assert losses[12] < losses[5]
    assert list(_values(one_rank, "eval/loss")) == [8, 12]
    assert _values(one_rank, "train/tokens_seen") == {step: step * 4 * 24 for step in losses}
    assert _values(one_rank, "train/learning_rate")[12] == pytest.approx(3e-4)
    for name in ("train/tokens_per_second", "train/step_time_s", "train/gradient_norm", "train/aux_loss"):
        assert all(value > 0 for value in _values(one_rank, name).values()), name
    for name in ("config.yaml", "versions.json", "report.html"):
        assert (one_rank / name).stat().st_size > 0, name
    assert (one_rank / "sample.txt").read_text().startswith("The ")


class _Enough(Exception):
    """Ends the building of a trainer."""


def _norms(rank: int, world_size: int, config: RunConfig) -> list[set[str]]:
    """The classes of the norms in the model that the engine is given, on a GPU and on a CPU."""
    found: list[set[str]] = []

    def enough(*, model: torch.nn.Module, **options: object) -> None:
        found.append({type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__})
        raise _Enough

    trainer.initialize = enough
    for is_gpu in (True, False):
        trainer.runs_on_gpu = lambda is_gpu=is_gpu: is_gpu
        with pytest.raises(_Enough):
            Trainer(config)
    return found


def test_norms_are_fused_on_gpus_only(tmp_path):
    [(on_gpu, on_cpu)] = run_ranks(_norms, 1, _config(tmp_path))
    assert on_cpu == {"LlamaRMSNorm"}
    assert on_gpu and "LlamaRMSNorm" not in on_gpu


def test_one_rank_neither_communicates_nor_waits(one_rank):
    for line in read_metrics(one_rank):
        parts = {part: line[f"train/{part}_time_s"] for part in ("compute", "communication", "wait", "data")}
        assert parts["communication"] == parts["wait"] == 0 < min(parts["compute"], parts["data"])
        assert sum(parts.values()) == pytest.approx(line["train/step_time_s"], rel=1e-12)
        assert line["train/peak_memory_gib"] > 0
        assert not any("rank_imbalance" in name or name == "train/compute_time_s/0" for name in line)


def test_the_saved_tokenizer_is_a_hugging_face_one(one_rank):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(one_rank / "tokenizer")
    assert tokenizer.decode(tokenizer("def f(x): ...")["input_ids"]) == "def f(x): ..."


def test_loads_add_up_across_adaptations(one_rank):
    lines, events = read_experts(one_rank), read_adaptation(one_rank)
    assert [event["step"] for event in events] == [4, 8, 12]
    assert [line["step"] for line in lines] == [5, 8, 10, 12]
    mean_k = _values(one_rank, "moe/mean_k/model.layers.1.mlp")
    live = _values(one_rank, "moe/live_experts/model.layers.1.mlp")
    previous = 0
    for line in lines:
        layer = line["layers"]["model.layers.1.mlp"]
        assert layer["num_tokens"] == (line["step"] - previous) * 4 * 24
        assert sum(layer["load"].values()) == pytest.approx(mean_k[line["step"]] * layer["num_tokens"])
        previous = line["step"]
    assert live[12] == events[-1]["layers"]["model.layers.1.mlp"]["live_after"]
    changes = [event["layers"]["model.layers.1.mlp"] for event in events]
    assert any(change["tokens_per_expert"][str(e)] > 0 for change in changes for e in change["pruned"]), (
        "the example must prune an expert that took tokens, or the test shows nothing"
    )


# Ranks, sequences per rank and micro step, micro steps, and what else differs.
LAYOUTS = {
    "accumulation": (1, 2, 2, {"zero_stage": 0}),
    "experts over ranks": (2, 2, 1, {"ep_size": 2, "zero_stage": 2, "activation_checkpointing": "deepspeed"}),
    "ZeRO-3": (2, 1, 2, {"zero_stage": 3, "activation_checkpointing": "torch"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_the_same_run_on_another_layout(layout, one_rank, tmp_path):
    world_size, micro, accumulation, parallel = LAYOUTS[layout]
    config = _with_batch(_config(tmp_path / "run", num_ranks=world_size, **parallel), micro, accumulation)
    run_ranks(_train, world_size, config)
    for name in ("train/loss", "eval/loss", "train/tokens_seen", "moe/mean_k"):
        assert _values(tmp_path / "run", name) == pytest.approx(_values(one_rank, name), rel=1e-4), name
    assert _counts(tmp_path / "run") == _counts(one_rank)
    assert saved_model_loss(tmp_path / "run") == pytest.approx(_values(tmp_path / "run", "eval/loss")[12], abs=1e-5)


def _counts(run_dir: Path) -> list[dict]:
    return [event["layers"]["model.layers.1.mlp"]["tokens_per_expert"] for event in read_adaptation(run_dir)]


def _train_as_configured(rank: int, world_size: int, overrides: list[str]) -> None:
    Trainer(load_config(overrides)).run()


def test_zero_3_in_bfloat16_trains_and_saves_its_model(tmp_path):
    shorter = ["training.steps=10", "training.eval_every_steps=10", "telemetry=disabled", "training.save_model=true"]
    overrides = ["experiment=smoke", "parallel=zero3_bf16", f"run_dir={tmp_path / 'run'}", *shorter]
    run_ranks(_train_as_configured, 2, overrides)
    losses = _values(tmp_path / "run", "train/loss")
    assert losses[10] < losses[5]
    assert saved_model_loss(tmp_path / "run") == pytest.approx(_values(tmp_path / "run", "eval/loss")[10], abs=2e-3)
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def _interrupted(rank: int, world_size: int, config: RunConfig) -> dict:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    trainer.logger.addHandler(handler)
    run = Trainer(config)
    train_step = run._train_step

    def stop_at_step_7(step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt
        train_step(step)

    run._train_step = stop_at_step_7
    is_raised = False
    try:
        run.run()
    except KeyboardInterrupt:
        is_raised = True
    rates = {group["lr"] for group in run.engine.optimizer.param_groups}
    return {"message": messages[-1], "is_raised": is_raised, "rates": rates}


def test_an_interrupt_keeps_what_was_written_and_says_so(tmp_path):
    [result] = run_ranks(_interrupted, 1, _config(tmp_path / "run"))
    assert result["is_raised"]
    assert result["message"] == f"Interrupted after 7 of 12 steps. What was written is in {tmp_path / 'run'}."
    # The last step taken was step 6 from 0: the fifth of ten after the warm-up, half-way between 3e-3 and 3e-4.
    assert list(result["rates"]) == [pytest.approx(1.65e-3)]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [5]
    assert (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "sample.txt").exists() and not (tmp_path / "run" / "model").exists()


def _refusals(rank: int, world_size: int, configs: list[RunConfig]) -> list[str]:
    answers = []
    for config in configs:
        try:
            Trainer(config)
        except DynMoEError as error:
            answers.append(str(error))
    return answers


def test_every_rank_refuses_what_rank_0_cannot_use(tmp_path):
    used, fresh = tmp_path / "used", tmp_path / "fresh"
    used.mkdir()
    (used / "metrics.jsonl").write_text(json.dumps({"step": 1}))
    (tmp_path / "short.txt").write_text("too short")
    config = _config(fresh, num_ranks=2)
    short = replace(config, data=replace(config.data, name="text_file", path=str(tmp_path / "short.txt")))
    for folder, text in run_ranks(_refusals, 2, [_config(used, num_ranks=2), short]):
        assert "exists and is not empty" in folder
        assert "The text has 9 characters" in text
    assert not fresh.exists()


def _warnings(rank: int, world_size: int, config: RunConfig) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    trainer.logger.addHandler(handler)
    Trainer(config).run()
    return messages


def test_routing_that_goes_wrong_is_warned_about_once_per_layer_on_rank_0(tmp_path):
    """Without adaptation the paper's router leaves more than 5 % of the tokens of this run without an expert."""
    config = replace(_config(tmp_path / "run", num_ranks=2), adaptation=None)
    config = replace(config, training=replace(config.training, log_every_steps=1, eval_sequences=10_000))
    first, second = run_ranks(_warnings, 2, config)
    assert len([message for message in first if "no open gate" in message]) == 1
    assert any("eval_sequences is 10000 but the held-out part has" in message for message in first)
    assert second == []
