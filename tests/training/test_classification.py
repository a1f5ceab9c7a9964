"""The recipes `glue_bert_large` and `image_vit_small`: as committed, and run at tiny sizes on a few rows and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.glue import TRAIN_FILES, write_glue, write_tokenizer
from tests.helpers.images import write_images
from tests.helpers.spawn import run_ranks
from transformers import AutoTokenizer, BertConfig, BertForPreTraining

from benchmarks.recipe_table import table as recipe_table
from dynmoe_ds.config.load import load_config
from dynmoe_ds.config.resolvers import GLUE_ROWS
from dynmoe_ds.config.schema import BertClassifierConfig, ImageEncoderSizes, RunConfig, ViTClassifierConfig
from dynmoe_ds.data.glue_tasks import GLUE_TASKS
from dynmoe_ds.data.image_folder import ImageExamples
from dynmoe_ds.routing import TopAnyConfig, TopKConfig
from dynmoe_ds.telemetry import read_adaptation, read_metrics
from dynmoe_ds.training import Trainer
from dynmoe_ds.training.predictions import Predictions
from dynmoe_ds.training.tasks.classification import scores

# Without dropout, whose noise differs between layouts; with pruning that happens in a few steps.
TINY = (
    "model.dropout=0.0", "model.moe_layers=[-1]", "model.num_experts=4", "model.num_slots=6", "optim.lr=3e-3",
    "adaptation.prune_below_share=0.9", "training.micro_batch_size=2", "training.log_every_steps=2",
    "telemetry=disabled",
)  # fmt: skip
GLUE = (*TINY, "data.num_train=4", "data.sequence_length=24")
IMAGES = (
    *TINY, "model.sizes={hidden_size:16,num_layers:2,num_heads:2,ffn_hidden_size:24,patch_size:4}",
    "data.image_size=8", "training.steps=12", "training.eval_every_steps=6",
)  # fmt: skip
STEPS = {"mrpc": (), "stsb": ("training.steps=8",), "mnli": ("training.steps=8",)}
BERT_LAYER, VIT_LAYER = "bert.encoder.layer.1.intermediate", "vit.layers.1.mlp"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_glue(folder / "glue")
    write_images(folder / "images")
    write_tokenizer(folder / "bert")
    torch.manual_seed(0)
    # Weights far larger than those that pretraining starts from, so that a few steps teach it something.
    config = BertConfig(
        vocab_size=200, max_position_embeddings=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, initializer_range=0.3,
    )  # fmt: skip
    BertForPreTraining(config).save_pretrained(folder / "bert")
    return folder


def glue_run(data: Path, run_dir: Path | str, *overrides: str) -> RunConfig:
    paths = (f"model.pretrained={data}/bert", f"data.path={data}/glue", f"run_dir={run_dir}")
    return load_config(["experiment=glue_bert_large", *paths, *overrides])


def image_run(data: Path, run_dir: Path | str, *overrides: str) -> RunConfig:
    # Ranks of tests may not have worker processes.
    paths = (f"data.path={data}/images", f"run_dir={run_dir}", "data.num_workers=0")
    return load_config(["experiment=image_vit_small", *paths, *overrides])


def test_the_glue_recipe_says_what_the_paper_says(data):
    config = glue_run(data, "runs/never-made-by-a-test")
    model, adaptation, optim, training = config.model, config.adaptation, config.optim, config.training
    assert isinstance(model, BertClassifierConfig) and adaptation is not None
    assert (model.moe_layers, model.num_experts, model.num_slots) == ((10,), 8, 10)
    assert model.dropout == 0.1, "as BERT's"
    assert config.router == TopAnyConfig()
    assert optim.lr in (2e-5, 3e-5, 5e-5)
    epoch = 3668 / 32
    assert training.steps == pytest.approx(10 * epoch, abs=1)
    assert training.eval_every_steps == pytest.approx(epoch, abs=1)
    assert adaptation.every_steps == pytest.approx(epoch, abs=1)
    assert adaptation.first_step == pytest.approx(2 / 3 * epoch, abs=1)
    assert adaptation.first_step - adaptation.window_steps == pytest.approx(1 / 3 * epoch, abs=1)
    assert (adaptation.rule, adaptation.min_unrouted_share, adaptation.prune_below_share) == ("paper", 0.0, 0.0)


def test_other_tasks_layouts_and_the_grid_are_overrides(data):
    fixed = ("adaptation=none", "router=top_k", "router.k=4")
    cell = glue_run(data, "unused", *fixed, "model.num_experts=16", "model.num_slots=16", "data.task=rte")
    assert isinstance(cell.router, TopKConfig) and cell.router.k == 4 and cell.adaptation is None
    assert (cell.model.num_slots, cell.training.steps) == (16, round(10 * 2490 / 32))
    ranks = glue_run(data, "unused", "parallel=local", "training.micro_batch_size=16")
    assert ranks.training.steps == round(10 * 3668 / 32)
    assert set(GLUE_ROWS) == set(GLUE_TASKS)


def test_the_image_recipe_says_what_the_paper_says(data):
    config = image_run(data, "runs/never-made-by-a-test")
    model, adaptation = config.model, config.adaptation
    assert isinstance(model, ViTClassifierConfig) and adaptation is not None
    assert model.sizes == ImageEncoderSizes(
        hidden_size=384, num_layers=12, num_heads=6, ffn_hidden_size=1536, patch_size=16
    )
    assert (model.moe_layers, model.num_experts, model.num_slots) == ((8, 10), 6, 12)
    assert (adaptation.every_steps, adaptation.window_steps) == (1, 1)
    assert config.router == TopAnyConfig()
    assert config.data.image_size == 224


def test_scores_by_hand():
    outputs = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    found = scores(Predictions(outputs, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)), ("accuracy", "f1"), False)
    # Cross entropies log(1 + e^-2), log(1 + e^-1), log(1 + e^2); two of three right; precision 1 and recall 1/2.
    assert found == pytest.approx(
        {"loss": (0.126928 + 0.313262 + 2.126928) / 3, "accuracy": 2 / 3, "f1": 2 / 3}, abs=1e-6
    )
    answers = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    found = scores(Predictions(answers, torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)), ("spearman",), True)
    assert found == pytest.approx({"loss": 2 / 3, "spearman": 1.0})


def _train(rank: int, world_size: int, configs: list[RunConfig]) -> list[dict[str, Any]]:
    results = []
    for config in configs:
        trainer = Trainer(config)
        trainer.run()
        count = trainer.parameter_count
        results.append({"without": count.live_without_experts, "row": count.per_router_row, "expert": count.per_expert})
    return results


def _values(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run_dir) if name in line]


def _changes(run_dir: Path) -> list[tuple[list[int], list[int]]]:
    """The ids of the experts added and pruned in the one layer, by adaptation."""
    (layers,) = zip(*(event["layers"].values() for event in read_adaptation(run_dir)), strict=True)
    return [([grown["expert_id"] for grown in layer["grown"]], layer["pruned"]) for layer in layers]


@pytest.fixture(scope="module")
def glue_runs(data, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """One run per kind of task: two metrics, a regression, two held-out files. The folder of all runs, and counts."""
    folder = tmp_path_factory.mktemp("glue_runs")
    configs = [glue_run(data, folder / name, *GLUE, f"data.task={name}", *STEPS[name]) for name in STEPS]
    (counts,) = run_ranks(_train, 1, configs)
    return folder, dict(zip(STEPS, counts, strict=True))


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("mrpc", ("accuracy", "f1")),
        ("stsb", ("pearson", "spearman")),
        ("mnli", ("accuracy", "accuracy_mismatched", "loss_mismatched")),
    ],
)
def test_a_glue_run_learns_and_reports_what_the_paper_s_table_has(name, metrics, glue_runs):
    folder, counts = glue_runs
    lines = read_metrics(folder / name)
    last = 8 if STEPS[name] else 20
    assert [line["step"] for line in lines] == list(range(2, last + 1, 2)), "10 epochs of 4 rows, in 2 steps each"
    assert lines[-1]["train/loss"] < 0.9 * lines[0]["train/loss"]
    for line in lines:
        assert {"eval/loss", "eval/score", "eval/mean_k", *(f"eval/{metric}" for metric in metrics)} <= set(line)
        own = [line[f"eval/{metric}"] for metric in GLUE_TASKS[name].metrics]
        assert line["eval/score"] == pytest.approx(sum(own) / len(own))
        count, live = counts[name], line[f"moe/live_experts/{BERT_LAYER}"]
        active = count["without"] + line["moe/mean_k"] * count["expert"][BERT_LAYER]
        active += (live - 4) * count["row"][BERT_LAYER]
        assert line["moe/active_parameters"] == pytest.approx(active, rel=1e-9)


def test_the_table_of_a_recipe_has_best_score_mean_k_and_active_parameters(glue_runs):
    folder, _ = glue_runs
    lines = read_metrics(folder / "mrpc")
    best = max(lines, key=lambda line: line["eval/score"])
    last = lines[-1]
    cells = [cell.strip() for cell in recipe_table([folder / "mrpc"]).splitlines()[2].strip("|").split("|")]
    assert cells == [
        "mrpc",
        "top_any",
        f"{last[f'moe/live_experts/{BERT_LAYER}']:.0f} of 6",
        "score",
        f"{100 * best['eval/score']:.2f}",
        str(best["step"]),
        f"{last['moe/mean_k']:.2f}",
        f"{last['moe/active_parameters'] / 1e6:.1f}M",
    ]
    with pytest.raises(SystemExit, match=r"has none of eval/score, eval/accuracy"):
        recipe_table([folder])


def test_a_glue_run_adapts_after_two_thirds_of_each_epoch(glue_runs):
    folder, _ = glue_runs
    events = read_adaptation(folder / "mrpc")
    assert [event["step"] for event in events] == list(range(1, 20, 2)), "2/3 of 2 steps is 1"
    assert {event["window_steps"] for event in events} == {1}
    grown, pruned = (sum(map(len, ids)) for ids in zip(*_changes(folder / "mrpc"), strict=True))
    assert grown > 0 and pruned > 0


def test_a_glue_run_keeps_its_tokenizer_and_writes_its_report(glue_runs, data):
    folder = glue_runs[0] / "mrpc"
    kept, given = (AutoTokenizer.from_pretrained(place) for place in (folder / "tokenizer", data / "bert"))
    assert kept("it rains")["input_ids"] == given("it rains")["input_ids"]
    assert "eval/score" in (folder / "metrics.jsonl").read_text()
    assert (folder / "report.html").is_file() and not (folder / "sample.txt").exists()


def test_real_tokens_are_counted_and_padding_is_not_routed(glue_runs, data):
    line = json.loads((glue_runs[0] / "mrpc" / "experts.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(data / "bert")
    rows = [row.split("\t")[3:] for row in TRAIN_FILES["mrpc"][1:]]
    lengths = [len(tokenizer(*row)["input_ids"]) for row in rows]
    assert len(set(lengths)) > 1, "there must be padding, or the test shows nothing"
    assert line["layers"][BERT_LAYER]["num_tokens"] == sum(lengths), "an epoch, without padding"


def _train_and_watch(rank: int, world_size: int, config: RunConfig) -> list[tuple[int, int]]:
    """What the run trained on, as (epoch, index of the image)."""
    read: list[tuple[int, int]] = []
    batch = ImageExamples.batch

    def watched(self: ImageExamples, indices: Any, device: Any = "cpu", epochs: Any = None) -> dict[str, torch.Tensor]:
        read.extend(zip(epochs or (), indices, strict=False))
        return batch(self, indices, device, epochs)

    ImageExamples.batch = watched
    _train(rank, world_size, [config])
    return read


@pytest.fixture(scope="module")
def image_run_and_reads(data, tmp_path_factory) -> tuple[Path, list[tuple[int, int]]]:
    folder = tmp_path_factory.mktemp("image_run")
    config = image_run(data, folder / "one", *IMAGES, "training.micro_batch_size=4")
    return folder / "one", run_ranks(_train_and_watch, 1, config)[0]


@pytest.fixture(scope="module")
def one_image_run(image_run_and_reads) -> Path:
    return image_run_and_reads[0]


def test_every_epoch_of_an_image_run_has_crops_of_its_own(image_run_and_reads):
    """12 steps of 4 images are 6 epochs of 8; evaluation asks for no epoch."""
    _, read = image_run_and_reads
    assert [epoch for epoch, _ in read] == [epoch for epoch in range(6) for _ in range(8)]
    assert sorted(read) == [(epoch, index) for epoch in range(6) for index in range(8)]


def test_an_image_run_learns_and_reports(one_image_run):
    lines = read_metrics(one_image_run)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    evaluations = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert evaluations[-1]["eval/accuracy"] >= 0.5 and evaluations[-1]["eval/loss"] < 0.75
    for line in lines:
        assert {"moe/mean_k", "moe/active_parameters", f"moe/live_experts/{VIT_LAYER}"} <= set(line)
        assert line["train/tokens_seen"] == line["step"] * 4 * 5, "4 patches and the classifier's token"
    assert (one_image_run / "classes.txt").read_text() == "blue\nred\n"


def test_an_image_run_adapts_after_every_step(one_image_run):
    events = read_adaptation(one_image_run)
    assert [event["step"] for event in events] == list(range(1, 13))


def test_two_ranks_train_as_one(data, glue_runs, one_image_run, tmp_path):
    """The same losses, scores, crops and pools with experts over two ranks, at half the batch per rank."""
    glue = glue_run(data, tmp_path / "glue", *GLUE, "parallel=local", "training.micro_batch_size=1")
    images = image_run(data, tmp_path / "images", *IMAGES, "parallel=local", "training.micro_batch_size=2")
    run_ranks(_train, 2, [glue, images])
    for name, one in {"glue": glue_runs[0] / "mrpc", "images": one_image_run}.items():
        for metric in ("train/loss", "eval/loss", "eval/accuracy", "moe/mean_k", "moe/active_parameters"):
            assert _values(tmp_path / name, metric) == pytest.approx(_values(one, metric), rel=1e-3), (name, metric)
        assert _changes(tmp_path / name) == _changes(one)
