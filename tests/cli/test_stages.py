"""`dynmoe stages`: what it starts, in which order, and where it goes on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from tests.helpers.vision_language import DATA, empty_files

from dynmoe_ds.cli import train
from dynmoe_ds.cli.main import main

FILES = [f"data.{key}={name}" for key, name in DATA.items()]
STAGES = "stages=demo_projector,demo_language,demo_experts"


class Started:
    """The runs that would have been started; each leaves what a finished run does, unless it is to fail."""

    def __init__(self) -> None:
        self.overrides: list[list[str]] = []
        self.codes = [0, 0, 0]

    def __call__(self, arguments: argparse.Namespace) -> int:
        self.overrides.append(arguments.overrides)
        code = self.codes[len(self.overrides) - 1]
        (run_dir,) = (text.partition("=")[2] for text in arguments.overrides if text.startswith("run_dir="))
        if code == 0:
            (Path(run_dir) / "model").mkdir(parents=True)
            (Path(run_dir) / "finished.json").write_text(json.dumps({"steps": 1}))
        return code


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    monkeypatch.delenv("RANK", raising=False)
    stand_in = Started()
    monkeypatch.setattr(train, "run", stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the overrides FILES name."""
    empty_files(tmp_path)
    monkeypatch.chdir(tmp_path)


def stages(folder: Path, *overrides: str) -> int:
    return main(["stages", "experiment=demo_vl", STAGES, f"run_dir={folder}", *FILES, *overrides])


def test_each_stage_starts_from_the_last(started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert stages(folder, "optim.lr=1e-3") == 0
    given = ["experiment=demo_vl", *FILES, "optim.lr=1e-3"]
    names = ["demo_projector", "demo_language", "demo_experts"]
    own = [[f"stage={name}", f"run_dir={folder}/{number}_{name}"] for number, name in enumerate(names, 1)]
    starts = [[], [f"stage.start={folder}/1_demo_projector/model"], [f"stage.start={folder}/2_demo_language/model"]]
    assert started.overrides == [[*given, *o, *s] for o, s in zip(own, starts, strict=True)]
    told = capsys.readouterr().out
    assert "stage 1 of 3: demo_projector\n" in told and "stage 3 of 3: demo_experts\n" in told


def test_a_failure_ends_it_and_the_same_command_goes_on(started: Started, tmp_path: Path) -> None:
    started.codes = [0, 130]
    assert stages(tmp_path / "run") == 130
    assert len(started.overrides) == 2
    started.codes += [0, 0]
    assert stages(tmp_path / "run") == 0
    assert [text for text in started.overrides[2] if text.startswith("stage=")] == ["stage=demo_language"]
    assert len(started.overrides) == 4
    assert stages(tmp_path / "run") == 0 and len(started.overrides) == 4, "nothing is left to do"


def test_the_faults_of_all_stages_come_before_the_first_run(
    started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stages(tmp_path / "run", "optim.lrr=1", "demo_experts:optim.lr=-1", "demo_language:data.path=gone.json") == 2
    told = capsys.readouterr().err
    assert told.count("There is no key 'optim.lrr'. Did you mean 'optim.lr'?") == 1
    assert "optim.lr is -1" in told and "data.path is 'gone.json', which is not a file here" in told
    assert stages(tmp_path / "run", "demo_language:training.save_model=false") == 2
    assert "training.save_model is false, but the next stage starts from the model." in capsys.readouterr().err
    assert stages(tmp_path / "run", "demo_language:run_dir=other") == 2
    assert "run_dir=other cannot be of one stage: `dynmoe stages` sets it." in capsys.readouterr().err
    assert stages(tmp_path / "run", "stages=demo_language,demo_experts,demo_language") == 2
    assert "stages names demo_language twice. Name every stage once." in capsys.readouterr().err
    assert main(["stages", "experiment=demo_vl", "stages=projektor", *FILES, "stage=language"]) == 2
    told = capsys.readouterr().err
    assert "There is no option stage=projektor. Did you mean 'projector'?" in told
    assert (
        "stage=language: `dynmoe stages` trains projektor. Use stages=NAMES, or `dynmoe train stage=language`." in told
    )
    assert started.overrides == []


def test_the_faults_of_all_stages_come_without_a_run_folder_too(
    started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["demo_projector:optim.lr=-1", "demo_experts:optim.beta1=7", "adaptation.every_steps=50", "projector:a.b=1"]
    assert main(["stages", "experiment=demo_vl", STAGES, *FILES, *own]) == 2
    told = capsys.readouterr().err
    assert "optim.lr is -1" in told and "optim.beta1 is 7" in told
    assert "projector:a.b=1 is for a stage that is not trained. The stages are demo_projector, demo_language," in told
    assert "adaptation.every_steps" not in told, "stages without experts do not hear of it, whatever else is wrong"
    assert started.overrides == []


def test_the_stages_of_the_papers_are_the_default(started: Started, tmp_path: Path) -> None:
    model = ["model.vision_pretrained=d", "model.text_pretrained=e", "training.sample_tokens=0"]
    assert main(["stages", "model=llava", "data=llava", f"run_dir={tmp_path}/x", *FILES, *model]) == 0
    chosen = [text for overrides in started.overrides for text in overrides if text.startswith("stage=")]
    assert chosen == ["stage=projector", "stage=language", "stage=experts"]


def test_an_override_may_be_of_one_stage_alone(started: Started, tmp_path: Path) -> None:
    assert stages(tmp_path / "run", "demo_language:data.sequence_length=64", "demo_language:optim.lr=1e-4") == 0
    special = ["data.sequence_length=64", "optim.lr=1e-4"]
    assert [[text for text in given if text in special] for given in started.overrides] == [[], special, []]
    assert not any("demo_language:" in text for overrides in started.overrides for text in overrides)
    assert all("data.path=train.json" in overrides for overrides in started.overrides)
    assert stages(tmp_path / "other", "experts:optim.lr=1e-4") == 2, "no stage of that name is to be run"
    assert len(started.overrides) == 3


def test_stages_without_experts_do_not_hear_of_adaptation(started: Started, tmp_path: Path) -> None:
    assert stages(tmp_path / "run", "adaptation.every_steps=50", "demo_experts:training.save_model=false") == 0
    assert [("adaptation.every_steps=50" in given) for given in started.overrides] == [False, False, True]
    # Also where what every stage needs is given to each by itself.
    before = len(started.overrides)
    started.codes += [0, 0, 0]
    files = [text for text in FILES if not text.startswith("data.path=")]
    names = ("demo_projector", "demo_language", "demo_experts")
    own = [f"{name}:data.path=train.json" for name in names]
    given = ["experiment=demo_vl", STAGES, *files, *own, "adaptation.every_steps=50", f"run_dir={tmp_path}/other"]
    assert main(["stages", *given]) == 0
    assert [("adaptation.every_steps=50" in given) for given in started.overrides[before:]] == [False, False, True]


def test_it_is_no_work_for_a_launcher(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert stages(tmp_path / "run") == 2
    assert "Under a launcher use `dynmoe train stage=NAME`." in capsys.readouterr().err
    assert started.overrides == []
