"""The comparison of routers, in its quick version and in its parts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dynmoe_ds as dm
from benchmarks.quality.cell import Cell, active_parameters, build_model, load_weights
from benchmarks.quality.report import first_below, spread, write_report
from benchmarks.quality.tasks import DigitsTask, TextTask, inputs_of, losses
from benchmarks.quality.variants import VARIANTS, Variant

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.quality", "--quick", "--results", f"{folder}", "--output", f"{folder}"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1200)
def test_every_cell_runs_and_none_runs_twice(tmp_path: Path) -> None:
    said = run(tmp_path, "--only", "dense", "top-any budget 2")
    assert any(line.startswith("1/4  ") for line in said.splitlines()) and len(list(tmp_path.glob("*-24-*.json"))) == 4
    said = run(tmp_path, "--tasks", "digits")
    assert said.splitlines()[-1].endswith("quality.png")
    cells = json.loads((tmp_path / "quality.json").read_text())["cells"]
    on_text = [("text", "dense"), ("text", "top-any budget 2")]
    assert [(cell["task"], cell["variant"]) for cell in cells] == [*on_text, *(("digits", name) for name in VARIANTS)]
    assert said.count("  ok  ") == len(VARIANTS) - 2, "the cells from before are not run again"
    for cell in cells:
        judge = cell["final"]["judge"]
        assert math.isfinite(judge["loss"]) and 0 < judge["loss"] < cell["curve"][0]["loss"] + 0.1, cell["variant"]
        group = VARIANTS[cell["variant"]].group
        assert (cell["births"] > 0) == (group == "growth" or "split" in cell["variant"]), cell["variant"]
        assert len(judge["mean_k"]) == (0 if group == "dense" else 2)
    page = (tmp_path / "quality.md").read_text()
    assert all(f"| {name} |" in page for name in VARIANTS)
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_splits_share_no_text_and_no_scan() -> None:
    text = TextTask()
    parts = {name: {tuple(row) for row in rows.tolist()} for name, rows in text._sequences.items()}
    assert not parts["train"] & parts["select"] and not parts["train"] & parts["judge"]
    assert not parts["select"] & parts["judge"] and min(map(len, parts.values())) > 100
    scans = {name: {image.numpy().tobytes() for image in images} for name, (images, _) in DigitsTask()._scans.items()}
    assert [len(scans[name]) for name in ("train", "select", "judge")] == [1297, 250, 250]
    assert not scans["train"] & scans["judge"] and not scans["select"] & scans["judge"]


def test_the_answers_to_the_questions() -> None:
    task = DigitsTask()
    task.pixel_noise = 0.0
    batch = task.training_batch(3, 5)
    images, labels = task._scans["train"]
    for patches, question, target, kinds in zip(
        batch["patches"], batch["questions"], batch["targets"], batch["kinds"], strict=True
    ):
        sides = [
            side.view(2, 2, 4, 4).permute(0, 2, 1, 3).reshape(8, 8) for side in patches.view(2, 4, 16)
        ]  # patches put together again
        left, right = (int(labels[[torch.equal(side, image) for image in images].index(True)]) for side in sides)
        want = {0: left, 1: 10 + left % 2, 2: 12 + left + right}[int(question)]
        assert target[0] == want and (target[1:] == -100).all()
        assert kinds[0] == question and (kinds[1:] == question + 3).all()


@pytest.mark.parametrize("task", [TextTask, DigitsTask])
def test_batches_depend_on_seed_and_step_alone(task: type[TextTask] | type[DigitsTask]) -> None:
    a, b, other = task().training_batch(1, 7), task().training_batch(1, 7), task().training_batch(2, 7)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["targets"], other["targets"])


def test_weights_go_to_a_larger_pool() -> None:
    small = Variant(name="small", group="x", router="top_any", num_experts=4, num_slots=4)  # type: ignore[arg-type]
    large = Variant(name="large", group="x", router="top_any", num_experts=4, num_slots=16)  # type: ignore[arg-type]
    task = DigitsTask()
    models = [build_model(Cell(variant=v, task="digits", seed=s, steps=1), task) for v, s in ((small, 0), (large, 1))]
    batch = task.training_batch(0, 0)
    want = models[0].eval()(**inputs_of(batch))
    assert not torch.allclose(models[1].eval()(**inputs_of(batch)), want, atol=1e-2)
    load_weights(models[1], models[0].state_dict())
    torch.testing.assert_close(models[1].eval()(**inputs_of(batch)), want, atol=1e-5, rtol=0)


def test_active_parameters_leave_out_what_is_looked_up() -> None:
    task = DigitsTask()
    variant = VARIANTS["top-2 of 4"]
    model = build_model(Cell(variant=variant, task="digits", seed=0, steps=1), task)
    expert = 3 * 64 * 96
    attention_norms_head = 2 * (4 * 64 * 64 + 2 * 64) + 64 + 31 * 64
    routers = 2 * 4 * 64
    patches = 16 * 64 + 64
    want = attention_norms_head + routers + patches + (2.0 + 1.5) * expert
    assert active_parameters(model, {"blocks.0.ffn": 2.0, "blocks.1.ffn": 1.5}) == want


def test_losses_count_what_is_asked() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    want = math.log(1 + math.exp(-2.0))
    torch.testing.assert_close(losses(logits, torch.tensor([[0, -100]])), torch.tensor([[want, 0.0]]))


def test_where_a_curve_reaches_a_loss() -> None:
    curve = [{"step": 10.0, "loss": 3.0}, {"step": 20.0, "loss": 2.0}, {"step": 30.0, "loss": 2.5}]
    assert first_below(curve, 2.5) == {"step": 15.0, "loss": 2.5}
    assert first_below(curve, 3.5) == curve[0]
    assert first_below(curve, 1.9) is None


def test_the_report_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    write_report([], tmp_path, machine={"python": "3"})
    page = tmp_path / "quality.md"
    page.write_text("# Mine\n" + page.read_text() + "and this\n")
    write_report([], tmp_path, machine={"python": "4"})
    text = page.read_text()
    assert text.startswith("# Mine\n") and text.endswith("and this\n") and "python 4" in text and "python 3" not in text


def test_spread() -> None:
    assert spread([1.0, 2.0, 4.0], 2) == "2.33 ± 1.50" and spread([1.0], 1) == "1.0"


def test_dense_is_the_size_of_two_experts() -> None:
    dense, two = VARIANTS["dense"], VARIANTS["top-2 of 16"]
    assert dense.router is None and dense.ffn_hidden_size == 2 * two.ffn_hidden_size
    assert isinstance(two.router, dm.TopKConfig)


def test_a_dense_ffn_starts_as_an_expert_does() -> None:
    dense, sparse = (
        build_model(Cell(variant=VARIANTS[name], task="digits", seed=0, steps=1), DigitsTask())
        for name in ("dense", "top-1 of 4")
    )
    for name in ("w1", "w3"):
        weight = dense.get_parameter(f"blocks.0.ffn.{name}.weight")
        expert = sparse.get_parameter(f"blocks.0.ffn.experts.{name}")
        assert weight.abs().max().item() == pytest.approx(expert.abs().max().item(), rel=0.01)
        assert weight.std().item() == pytest.approx(expert.std().item(), rel=0.05)
    for name in ("blocks.0.attention.qkv", "blocks.1.attention.out", "head"):
        assert torch.equal(dense.get_parameter(f"{name}.weight"), sparse.get_parameter(f"{name}.weight"))
