"""What the doctor says of a run's weights and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.vision_language import DATA, write_digits

from dynmoe_ds.cli.doctor_of_runs import run_findings
from dynmoe_ds.cli.main import main


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("doctor") / "digits")


def examine(digits: Path, *overrides: str) -> dict[str, tuple[str, str]]:
    data = [f"data.{key}={digits / name}" for key, name in DATA.items()]
    findings = run_findings(["experiment=demo_vl", "stage=demo_experts", "run_dir=never", *data, *overrides])
    return {finding.subject: (finding.state, finding.text) for finding in findings}


def test_a_run_that_has_everything(digits: Path) -> None:
    found = examine(digits)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["data.path"][1] == f"48 samples in {digits / 'train.json'}"
    assert found["data.held_out_path"][1].startswith("10 samples in") and found["data.tokenizer"][1] == "54 tokens"
    assert found["ranks"][1] == "2 can be started here"


def test_pretrained_folders_are_looked_into(digits: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text("{}")
    (whole / "model.safetensors").write_bytes(b"")
    empty = tmp_path / "empty"
    empty.mkdir()
    models = [f"model.vision_pretrained={whole}", "model.vision_sizes=null", "model.text_sizes=null"]
    found = examine(digits, *models, f"model.text_pretrained={empty}")
    assert found["model.vision_pretrained"] == ("ok", f"{whole} has a configuration and weights")
    lacking = f"{empty} has no config.json and no weights (*.safetensors, *.bin)"
    assert found["model.text_pretrained"] == ("missing", lacking)
    found = examine(digits, *models, "model.text_pretrained=gone")
    assert found["model.text_pretrained"][0] == "missing" and found["model.text_pretrained"][1].startswith(
        "gone is not a"
    )


def test_samples_are_counted(digits: Path, tmp_path: Path) -> None:
    samples = json.loads((digits / "train.json").read_text())
    samples[0]["image"] = "gone.png"
    file = tmp_path / "more.json"
    file.write_text(json.dumps(samples))
    for policy, state in (("stop", "missing"), ("skip", "ok")):
        found = examine(digits, f"data.path={file}", f"data.on_broken={policy}")["data.path"]
        assert found[0] == state
        assert found[1].startswith(f"47 samples in {file}, and 1 that cannot be used:\n  - 1 x an image is missing: ")
    file.write_text("[")
    assert "is not valid JSON" in examine(digits, f"data.path={file}")["data.path"][1]
    empty = tmp_path / "tokenizer"
    empty.mkdir()
    state, text = examine(digits, f"data.tokenizer={empty}")["data.tokenizer"]
    assert state == "missing" and "holds no tokenizer that can be read" in text


def test_other_data_are_looked_for(tmp_path: Path) -> None:
    found = run_findings(["experiment=image_vit_small", f"data.path={tmp_path}", "run_dir=never"])
    assert [(f.state, f.text) for f in found if f.subject == "data.path"] == [("ok", f"{tmp_path} is there")]
    found = run_findings(["experiment=image_vit_small", "data.path=gone", "run_dir=never"])
    (missing,) = (finding for finding in found if finding.subject == "data.path")
    assert missing.state == "missing" and missing.text.startswith("gone is not there (seen from")


def test_faults_are_missing_and_end_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "experiment=moe_llava_phi", "stage=projector"]) == 1
    told = capsys.readouterr().out
    assert "missing  configuration        data.path is null. Name the JSON file to learn from." in told
    assert "One of model.text_pretrained and model.text_sizes must be set" in told
    assert told.endswith("Missing: configuration.\n")
