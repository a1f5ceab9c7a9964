"""`make demo-vl` at its smallest, through the real deepspeed launcher on two ranks."""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.cli.main import main
from dynmoe_ds.data.digit_questions import KINDS
from tests.helpers.command import dynmoe
from tests.helpers.vision_language import DATA, SIZES, write_digits
from tests.launcher.test_demo import lines, run
from tests.telemetry.test_comparison import rows
from tests.telemetry.test_report import Page

STEPS = {"demo_projector": 2, "demo_language": 6, "demo_experts": 6}
SHORTER = [
    *SIZES, f"stages={','.join(STEPS)}", *(f"{stage}:training.steps={steps}" for stage, steps in STEPS.items()),
    "training.eval_every_steps=3", "training.micro_batch_size=4", "training.log_every_steps=1",
    "adaptation.every_steps=2", "adaptation.window_steps=1",
]  # fmt: skip
IMAGELESS = ("image", "text")  # what is asked in text alone has no picture
LAYERS = ("model.language_model.layers.0.mlp", "model.language_model.layers.2.mlp")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of all stages, and what was said."""
    folder = tmp_path_factory.mktemp("demo_vl")
    digits = write_digits(folder / "digits")
    paths = [f"data.{key}={digits / name}" for key, name in DATA.items()]
    command = dynmoe("stages", "experiment=demo_vl", f"run_dir={folder / 'run'}", *paths, *SHORTER)
    result = run(command, timeout_s=400)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run", result.stdout + result.stderr


@pytest.fixture(scope="module")
def evaluated(demo: tuple[Path, str]) -> tuple[Path, str]:
    """The folder of the stage with experts after `dynmoe evaluate` and `dynmoe report`, and what evaluation printed."""
    folder, said = demo[0] / "3_demo_experts", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["evaluate", f"{folder}", "--answers", f"{folder / 'answers.png'}"]) == 0
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["report", f"{folder}"]) == 0
        assert main(["report", f"{demo[0]}"]) == 0
    return folder, said.getvalue()


def last(folder: Path) -> dict[str, Any]:
    return lines(folder / "metrics.jsonl")[-1]


@pytest.mark.launcher
def test_every_stage_trains_on_two_ranks_from_the_last_ones_model(demo: tuple[Path, str]) -> None:
    folder, said = demo
    for number, (stage, steps) in enumerate(STEPS.items(), 1):
        run_dir = folder / f"{number}_{stage}"
        assert f"dynmoe: stage {number} of 3: {stage}\n" in said and f"starting 2 ranks; run folder {run_dir}" in said
        assert last(run_dir)["step"] == steps and (run_dir / "model" / "model.safetensors").is_file()
        assert "num_ranks: 2" in (run_dir / "config.yaml").read_text()
    names = [f"{number}_{stage}" for number, stage in enumerate(STEPS, 1)]
    for before, name in pairwise(names):
        assert f"start: {folder}/{before}/model\n" in (folder / name / "config.yaml").read_text()
    assert "Training experts: " in said


@pytest.mark.launcher
def test_experts_grow_and_every_kind_is_told_apart(demo: tuple[Path, str]) -> None:
    folder = demo[0] / "3_demo_experts"
    found = last(folder)
    by_kind = [found[f"eval/exact_match/{kind}"] for kind in KINDS]
    assert found["eval/exact_match"] == pytest.approx(sum(by_kind) / len(KINDS)), "two questions of each"
    assert {round(2 * share) / 2 for share in by_kind} == set(by_kind)
    for kind in KINDS:
        for modality in ("image", "text"):
            name = f"eval/mean_k_per_kind/{modality} {kind}"
            assert (name in found) == ((modality, kind) != IMAGELESS), name
            assert 0 < found.get(name, 1.0) <= 8
        names = [f"eval/mean_k_per_kind/{modality} {kind}" for modality in ("image", "text")]
        of_tokens = [found[name] for name in names if name in found]
        assert min(of_tokens) <= found[f"eval/mean_k_per_question/{kind}"] <= max(of_tokens)
    assert found["eval/mean_k_per_question/text"] == found["eval/mean_k_per_kind/text text"], "without images"
    for modality in ("image", "text"):
        of_kinds = [found[f"eval/mean_k_per_kind/{modality} {kind}"] for kind in KINDS if (modality, kind) != IMAGELESS]
        assert min(of_kinds) <= found[f"eval/mean_k_per_modality/{modality}"] <= max(of_kinds)
    changes = [layer for event in lines(folder / "adaptation.jsonl") for layer in event["layers"].items()]
    for name in LAYERS:
        born, pruned = (sum(len(c[what]) for layer, c in changes if layer == name) for what in ("grown", "pruned"))
        assert born > 0 and found[f"moe/live_experts/{name}"] == 4 + born - pruned


@pytest.mark.launcher
def test_evaluation_in_one_process_says_what_two_ranks_said(
    demo: tuple[Path, str], evaluated: tuple[Path, str]
) -> None:
    folder, printed = evaluated
    said = dict(line.rsplit(maxsplit=1) for line in printed.splitlines())
    trained = last(folder)
    names = [name for name in trained if name.startswith(("eval/exact_match", "eval/mean_k"))]
    assert len(names) > 2 * len(KINDS)
    for name in names:
        assert float(said[name]) == pytest.approx(trained[name], rel=1e-4), name


@pytest.mark.launcher
def test_the_reports_show_answers_kinds_and_live_experts(demo: tuple[Path, str], evaluated: tuple[Path, str]) -> None:
    folder, answers = evaluated[0], (evaluated[0] / "answers.png").read_bytes()
    assert answers.startswith(b"\x89PNG")
    one = (folder / "report.html").read_text()
    titles = {"Held-out questions answered", "Live experts", "Experts per token by kind", "Questions and answers"}
    assert {*titles, "Experts per token by kind and layer"} <= set(Page(one).alternatives)
    assert "kinds are shown" not in one, "all of them are"
    for modality in ("image", "text"):
        mean_k = last(folder)[f"eval/mean_k_per_modality/{modality}"]
        assert f"experts per {modality} token, held-out, last{mean_k:.2f}" in Page(one).words
    live = {name: f"{last(folder)[f'moe/live_experts/{name}']:.0f}" for name in LAYERS}
    by_layer = {row[0]: row[1:3] for row in rows(one)}
    assert all(by_layer[name] == ["4", live[name]] for name in LAYERS)
    both = (demo[0] / "report.html").read_text()
    found = rows(both)
    assert ["answered exactly", "all", *sorted(KINDS)] in found
    for number, stage in enumerate(STEPS, 1):
        values = last(demo[0] / f"{number}_{stage}")
        shares = [f"{values[f'eval/exact_match{kind}']:.1%}" for kind in ("", *(f"/{kind}" for kind in sorted(KINDS)))]
        assert [f"{number}_{stage}", *shares] in found
    assert "3_demo_experts: questions and answers" in Page(both).words
