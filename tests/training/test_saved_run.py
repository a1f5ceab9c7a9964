"""What is used of a run in one process: the model of a checkpoint is that of the engine that wrote it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks
from tests.helpers.vision_language import tiny_run, write_digits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynmoe_ds as dm
from dynmoe_ds.cli.main import main
from dynmoe_ds.config.schema import CheckpointConfig, RunConfig
from dynmoe_ds.training.run_checkpoints import Preempted
from dynmoe_ds.training.saved_run import SavedRun
from dynmoe_ds.training.trainer import Trainer

Trained = dict[str, tuple[Path, list[dict[str, Any]]]]
PROMPT = [5, 9, 30, 7, 11]
STOPPED_AT, END = 9, 12
DTYPES = {"text": torch.bfloat16, "vision-language": torch.float32}


def text_run(folder: Path, **values: Any) -> RunConfig:
    """Adaptations at 4, 8 and 12, checkpoints at 6 and 12 and where it is stopped."""
    checkpoint = CheckpointConfig(every_steps=6, keep=3)
    return small_run(folder, parallel__num_ranks=2, parallel__ep_size=2, checkpoint=checkpoint, **values)


def vision_language_run(folder: Path, digits: Path) -> RunConfig:
    """Experts split at steps 4 and 8."""
    return tiny_run(
        digits, folder, "experts", "parallel.num_ranks=2", "parallel.ep_size=2", "parallel.zero_stage=1",
        "training.steps=12", "training.eval_every_steps=12", "checkpoint.every_steps=6", "checkpoint.keep=3",
        "adaptation=split_all", "adaptation.every_steps=4", "adaptation.window_steps=2",
        "adaptation.last_growth_step=null", "router=top_any_budget", "optim.lr=5e-2",
    )  # fmt: skip


def train_twice(rank: int, world_size: int, run: RunConfig) -> list[dict[str, Any]]:
    """What the engine measures and writes, and its live experts: when it was stopped, and at the end of the run."""
    found = []
    for stop_after in (STOPPED_AT, None):
        count = itertools.count(1)
        trainer = Trainer(run, should_stop=lambda count=count, last=stop_after: next(count) == last)
        try:
            trainer.run()
        except Preempted:
            shutil.copytree(run.run_dir, f"{run.run_dir}_stopped") if rank == 0 else None
        metrics = {metric.name: metric.value for metric in trainer._evaluate()}
        live = {name: placement.live_ids for name, placement in trainer.engine.placements().items()}
        found.append({"metrics": metrics, "written": greedy(trainer.engine), "live": live})
    return found


def greedy(model: Any) -> list[int]:
    """The likeliest tokens after the prompt, by a loop without a cache."""
    model.eval()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(10):
            logits: Tensor = model(input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    model.train()
    return ids[0, len(PROMPT) :].tolist()


def agree(saved: SavedRun, of_engine: dict[str, Any], dtype: torch.dtype) -> None:
    assert {param.dtype for param in saved.model.parameters()} == {dtype}
    assert {name: layer.placement.live_ids for name, layer in saved.layers.items()} == of_engine["live"]
    assert greedy(saved.model) == of_engine["written"]
    found, want = {metric.name: metric.value for metric in saved.evaluate()}, dict(of_engine["metrics"])
    scored = "eval/forward_flops_per_token"
    assert found.pop(scored) <= want.pop(scored), "a pool without free slots"
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in want.items()}


def train_in(folder: Path, kind: str) -> list[dict[str, Any]]:
    if kind == "text":
        run = text_run(folder / "run", parallel__zero_stage=2, parallel__dtype="bfloat16")
    else:
        run = vision_language_run(folder / "run", write_digits(folder / "digits"))
    found: list[dict[str, Any]] = run_ranks(train_twice, 2, run, timeout_s=250)[0]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """By kind: the folder of `run`, which came to its end, and `run_stopped`, and what their engines said."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in DTYPES}
    return {kind: (folder, train_in(folder, kind)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.timeout(600)
def test_a_checkpoint_is_the_model_of_the_engine_that_wrote_it(kind: str, trained: Trained) -> None:
    """Of a run that was stopped, and at the end of one that came to it, whose `model` folder says the same."""
    folder, (stopped, ended) = trained[kind]
    killed, run = folder / "run_stopped", folder / "run"
    assert any(live != tuple(range(4)) for live in stopped["live"].values()), "the pool is that of the start"
    assert ended["metrics"] != stopped["metrics"]
    assert not (killed / "model").exists()
    saved = SavedRun(killed)
    assert saved.source == killed / "checkpoints" / f"step-{STOPPED_AT:08d}"
    agree(saved, stopped, DTYPES[kind])
    at_the_end = SavedRun(run / "checkpoints" / f"step-{END:08d}")
    agree(at_the_end, ended, DTYPES[kind])
    assert SavedRun(run).source == run / "model"
    of_model = SavedRun(run).model.state_dict()
    assert of_model.keys() == at_the_end.model.state_dict().keys()
    assert all(torch.equal(tensor, of_model[name]) for name, tensor in at_the_end.model.state_dict().items())


def test_the_verbs_take_checkpoints_and_say_which(
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By an absolute or a relative path: a run, its folder of checkpoints, or one of them."""
    run = trained["text"][0] / "run_stopped"
    checkpoints = run / "checkpoints"
    written = []
    for path in (run, checkpoints, checkpoints / "step-00000009", checkpoints / "step-00000006"):
        assert main(["generate", f"{path}", "--prompt", "The ", "--tokens", "8"]) == 0
        told = capsys.readouterr()
        written.append(told.out)
        name = "step-00000006" if path.name.endswith("6") else "step-00000009"
        assert told.err == f"dynmoe: using {checkpoints / name}\n"
    assert len(set(written[:3])) == 1 != len(set(written))
    monkeypatch.chdir(checkpoints)
    for name in (".", "step-00000009"):
        assert main(["generate", name, "--prompt", "The ", "--tokens", "8"]) == 0
        assert capsys.readouterr().out == written[0]
    assert main(["export", "step-00000009", f"{tmp_path / 'out'}"]) == 0
    dm.register_auto_classes()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert greedy(back) == trained["text"][1][0]["written"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == back.config.vocab_size


def test_a_model_needs_neither_data_nor_pretrained_folders(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation does need the data, and says so."""
    run = shutil.copytree(trained["vision-language"][0] / "run_stopped", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("digits/", "gone/").replace("/digits", "/gone"))
    assert main(["generate", f"{run}", "--prompt", "What is one plus two?", "--tokens", "2"]) == 0
    assert main(["evaluate", f"{run}"]) == 2
    assert "gone" in capsys.readouterr().err


def test_what_is_no_checkpoint_of_a_run(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = trained["text"][0] / "run_stopped"

    def refused(path: Path) -> str:
        assert main(["evaluate", f"{path}"]) == 2
        return capsys.readouterr().err

    run = shutil.copytree(whole, tmp_path / "run")
    assert "step-00000007 has no checkpoint." in refused(run / "checkpoints" / "step-00000007")
    (run / "model.json").rename(run / "kept")
    assert "run has no model.json, which says what model step-00000009 is a checkpoint of" in refused(run)
    described = json.loads((run / "kept").read_text())
    (layer,) = described["layers"].values()
    for change, message in (
        ({"layers": {"model.layers.0.mlp": layer}}, "its MoE layers are model.layers.1.mlp, not model.layers.0.mlp."),
        ({"config": described["config"] | {"intermediate_size": 40}}, "3 tensors are in one of the two alone, or have"),
        ({"format": "other"}, "model.json is no manifest of a model"),
    ):
        (run / "model.json").write_text(json.dumps(described | change))
        assert message in refused(run)
    (run / "kept").rename(run / "model.json")
    (file,) = (run / "checkpoints" / "step-00000009").glob("tensors/__0_0.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    assert "it was cut off. Use another checkpoint." in refused(run)
    (run / "config.yaml").unlink()
    assert f"{run} has no config.yaml (seen from" in refused(run / "checkpoints" / "step-00000006")
    shutil.rmtree(run / "checkpoints")
    shutil.copy(whole / "config.yaml", run)
    assert "run has no model (seen from" in refused(run)
