"""`dynmoe launch` from outside: what it prints, what it refuses, what it starts here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
import yaml

from dynmoe_ds.cli import launch, launcher, train
from dynmoe_ds.cli.main import main
from dynmoe_ds.errors import DataError, DynMoEError
from dynmoe_ds.launching import checks, hosts
from dynmoe_ds.telemetry.run_folder import FINISHED_FILE, RunFolder
from dynmoe_ds.telemetry.run_owner import RunOwnership
from dynmoe_ds.telemetry.run_state import read_state

SMOKE = ["experiment=smoke", "telemetry=disabled"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("DYNMOE_RUN_DIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def test_a_dry_run_prints_the_script_and_touches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = ["launch=slurm", "launch.nodes=2", "launch.partition=gpu", "launch.time=1-12", "launch.global_batch_size=16"]
    assert main(["launch", "--dry-run", *own, *SMOKE, "run_dir=runs/a"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("#!/bin/bash\n#SBATCH --job-name=a\n") and said.err == ""
    for line in ("--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--time=1-12"):
        assert f"#SBATCH {line}\n" in said.out
    assert f"run={tmp_path}/runs/a\n" in said.out
    assert list(tmp_path.iterdir()) == []


def test_options_may_stand_between_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "launch=slurm", "--dry-run", "launch.partition=gpu", *SMOKE, "run_dir=runs/a"]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --job-name=a\n" in said and "#SBATCH --partition=gpu\n" in said
    with pytest.raises(SystemExit) as caught:
        main(["launch", "launch=slurm", "--dry-rn", *SMOKE])
    assert caught.value.code == 2 and "unrecognized arguments: --dry-rn" in capsys.readouterr().err


def test_fewer_gpus_than_ranks_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert main(["launch", "--dry-run", *SMOKE, "run_dir=runs/a", "launch.global_batch_size=7"]) == 2
    said = capsys.readouterr().err
    assert "parallel.num_ranks is 2 but there is 1 GPU here." in said and "a multiple of the 4 sequences" in said


def test_a_dry_run_of_the_other_kinds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    assert main(["launch", "--dry-run", "launch=hosts_torchrun", *SMOKE, "run_dir=runs/a"]) == 0
    assert capsys.readouterr().out.count("\nssh -tt ") == 2
    pods = ["launch=kubernetes", "launch.claim=shared", "launch.nodes=2"]
    assert main(["launch", "--dry-run", *pods, *SMOKE, "run_dir=/workspace/a"]) == 0
    assert [one["kind"] for one in yaml.safe_load_all(capsys.readouterr().out)] == ["ConfigMap", "PyTorchJob"]
    assert main(["launch", "--dry-run", *SMOKE, "run_dir=runs/s", "seed=1,2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run\tseed", "0\t1", "1\t2",
        f"dynmoe train --config {tmp_path}/runs/s/0/launch/config.yaml",
        f"dynmoe train --config {tmp_path}/runs/s/1/launch/config.yaml",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["hostfile"]


def test_all_faults_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    wrong = ["launch=slurm", "launch.nodes=3", "launch.time=1:2:3:4", "parallel.ep_size=3", "optim.lrr=1"]
    assert main(["launch", *wrong, *SMOKE, "run_dir=runs/a"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dynmoe: 7 faults in the configuration:\n")
    programs = ("no sbatch on the", "no scontrol", "no squeue")
    of_the_job = ("launch.time is '1:2:3:4'", "a multiple of launch.nodes (3)")
    for text in (*of_the_job, *programs, "parallel.ep_size is 3 but must divide the 2 ranks", "'optim.lrr'"):
        assert text in said
    wrong = ["launch=slurm", "launch.nodes=3", "launch.gpus_per_node=1", "launch.global_batch_size=7"]
    assert main(["launch", *wrong, *SMOKE, "run_dir=runs/a", "seed=1,2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dynmoe: 5 faults in the configuration:\n")
    for text in ("a multiple of launch.nodes (3)", "a multiple of the 4 sequences", *programs):
        assert text in said
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "launch.nodes=1,2",
            "The override 'launch.nodes=1,2' cannot be read. Write launch.KEY=VALUE with one value, and quotes around "
            "text that holds '=', spaces or commas, as in launch.KEY='\"a=b\"'.",
        ),
        ("launch=pbs", "There is no option launch=pbs."),
        ("launch.nodse=1", "There is no key 'launch.nodse'."),
        (
            "launch.global_batch_size=8",
            "launch.global_batch_size is 8 and training.gradient_accumulation_steps is given, too, which follows from "
            "it. Leave out one of them.",
        ),
    ],
)
def test_overrides_of_the_verb(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = "training.gradient_accumulation_steps=2"
    assert main(["launch", "--dry-run", *SMOKE, "run_dir=runs/a", other, override]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["launch"], ["train", "-m"]], ids=" ".join)
def test_a_sweep_that_cannot_be_enumerated_is_a_fault(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, *SMOKE, "run_dir=s", "optim.lr=interval(1e-4,1e-3)", "seed=shuffle(1,2)"]) == 2
    assert capsys.readouterr().err == (
        "dynmoe: 2 faults in the configuration:\n"
        "  - The values of the override 'optim.lr=interval(1e-4,1e-3)' cannot be enumerated. Write them with commas, "
        "or as range(START,STOP,STEP).\n"
        "  - The override 'seed=shuffle(1,2)' shuffles its values, so that the same command, given again, would be "
        "another sweep. Leave out the shuffling.\n"
    )


class Started:
    """The runs that would have been started here, each with its exit code; the first of them comes to its end."""

    def __init__(self, *codes: int | DynMoEError) -> None:
        self.configs: list[Path] = []
        self.codes = codes

    def __call__(self, arguments: argparse.Namespace) -> int:
        assert arguments.overrides == []
        self.configs.append(Path(arguments.config))
        code = self.codes[len(self.configs) - 1]
        run_dir = self.configs[-1].parents[1]
        RunFolder(run_dir).append_metrics(3, {"eval/loss": 3.0}, time_s=1.0)
        if code == 0:
            (run_dir / FINISHED_FILE).write_text('{"steps": 1000000}')
        if isinstance(code, DynMoEError):
            raise code
        return code

    @property
    def seeds(self) -> list[int]:
        return [yaml.safe_load(path.read_text())["seed"] for path in self.configs]


def test_a_sweep_here_is_one_run_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = Started(0, 3, DataError("No text."), 0)
    monkeypatch.setattr(train, "run", started)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    sweep = [*SMOKE, "run_dir=runs/s", "seed=range(1,5)", "launch.environment=['NOTE=a']"]
    assert main(["launch", *sweep]) == 3
    assert started.seeds == [1, 2, 3, 4], "it goes on after a run that failed"
    said = capsys.readouterr()
    assert (tmp_path / "runs" / "s" / "sweep.tsv").read_text() == "run\tseed\n0\t1\n1\t2\n2\t3\n3\t4\n"
    assert os.environ["NOTE"] == "a"
    assert said.err == (
        "dynmoe: No text.\n"
        "dynmoe: 2 of 4 runs failed: 1 (exit code 3), 2 (exit code 2). The same command starts these again, from their "
        "latest checkpoints where there are any.\n"
    )
    table = (tmp_path / "runs" / "s" / "sweep.md").read_text()
    assert table in said.out and table.count("| finished |") == 2
    assert f"dynmoe: `dynmoe report {tmp_path}/runs/s` makes this table" in said.out

    again = Started(85)
    monkeypatch.setattr(train, "run", again)
    assert main(["train", "-m", *sweep]) == 85, "one that was stopped ends the sweep"
    assert again.seeds == [2], "those at their end are left alone"
    assert f"dynmoe: {tmp_path}/runs/s/0 has come to its end already\n" in capsys.readouterr().out


def test_a_sweep_is_not_mixed_with_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.tsv").write_text("run\tseed\n0\t1\n1\t2\n")
    own = ["launch", "--dry-run", *SMOKE, "run_dir=s"]
    assert main([*own, "seed=1,2,3"]) == 0, "more of them"
    for wrong, line in (("seed=1,3", "1\\t2"), ("optim.lr=1e-3,1e-4", "run\\tseed"), ("seed=range(1,2)", "1\\t2")):
        assert main([*own, wrong]) == 2
        assert f"{tmp_path}/s holds another sweep: sweep.tsv has the line '{line}'" in capsys.readouterr().err


def test_a_run_whose_ranks_leave_no_word_is_known_as_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launcher, "supervise", lambda command, environment: 1)
    (tmp_path / "a" / "launch").mkdir(parents=True)
    assert main(["train", *SMOKE, "run_dir=a"]) == 1
    assert read_state(tmp_path / "a").told == "Failed at step 0. The exit code is 1."


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_multirun_may_stand_anywhere(flag: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(launch, "check_and_launch", lambda *values, **named: given.append((values, named)) or 0)
    overrides = ["experiment=smoke", "seed=1,2", "run_dir=s"]
    assert main(["train", *overrides[:place], flag, *overrides[place:]]) == 0
    assert given == [((overrides,), {"needs_sweep": True})]


def test_what_is_no_multirun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--multirun", *SMOKE, "run_dir=s", "training.sample_prompt='a, b'"]) == 2
    assert "--multirun is given, but every key has one value. Give several (seed=0,1), or" in capsys.readouterr().err
    assert main(["train", "--multirun", *SMOKE, "seed=1,2"]) == 2
    assert "run_dir is not set. A sweep needs a folder" in capsys.readouterr().err
    assert main(["train", "-m", "--config", "a.yaml"]) == 2
    assert "--config a.yaml is one run, but --multirun is for several. Leave out one." in capsys.readouterr().err
    assert main(["train", *SMOKE, "seed=1,2"]) == 2
    assert "`dynmoe train --multirun` makes a run of each" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "-m", *SMOKE, "seed=1,2"]) == 2
    assert "Under a launcher leave out --multirun." in capsys.readouterr().err


@pytest.mark.parametrize("own", [[], ["launch=hosts_pdsh"], ["launch=hosts_torchrun", "launch.start=print"]], ids=str)
def test_a_folder_that_a_run_writes_into_is_left_alone(
    own: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    monkeypatch.setattr(checks, "find_missing_programs", lambda launch: [])
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    ownership = RunOwnership(tmp_path / "runs" / "a")
    assert ownership.try_take()
    try:
        assert main(["launch", *own, *SMOKE, "run_dir=runs/a"]) == 2
    finally:
        ownership.release()
    said = capsys.readouterr()
    assert said.out == "" and f"run_dir '{tmp_path}/runs/a' is in use by process {os.getpid()} on " in said.err
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("code", "last"),
    [
        (0, ""), (130, "interrupted"), (85, "dynmoe: stopped as asked, with a checkpoint. The same command goes on"),
        (143, "dynmoe: ended by SIGTERM, without a new checkpoint. The same command goes on from the latest"),
        (7, "dynmoe: the job has failed (exit code 7). What its ranks said first, above, may tell why."),
        (255, "dynmoe: the job has failed (exit code 255). What"),
    ],
)  # fmt: skip
def test_the_last_line_of_a_launch_on_hosts_says_how_it_ended(
    code: int, last: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    monkeypatch.setattr(checks, "find_missing_programs", lambda launch: [])
    monkeypatch.setattr(hosts, "start", lambda launch, runs: code)
    assert main(["launch", "launch=hosts_torchrun", *SMOKE, "run_dir=runs/a"]) == code
    said = capsys.readouterr()
    assert said.out == f"dynmoe: starting 2 ranks; run folder {tmp_path}/runs/a; Ctrl-C stops\n"
    assert said.err.startswith(last) and said.err.count("\n") == bool(last)


def test_the_commands_of_hosts_are_printed_for_hands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    printed = ["launch=hosts_torchrun", "launch.start=print"]
    assert main(["launch", *printed, *SMOKE, "run_dir=runs/a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["# a", "# b"] and all(line.startswith(f"cd {tmp_path} && env ") for line in lines[1::2])
    assert (tmp_path / "runs" / "a" / "launch" / "config.yaml").exists(), "which they name"


def test_train_takes_a_whole_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from dynmoe_ds.config.load import load_config, read_config, to_yaml

    config = load_config([*SMOKE, "run_dir=runs/a", "parallel.num_ranks=1000", "parallel.ep_size=1"])
    Path("config.yaml").write_text(to_yaml(config))
    assert read_config("config.yaml") == config
    assert main(["train", "--config", "config.yaml", "seed=1"]) == 2
    assert capsys.readouterr().err == (
        "dynmoe: --config config.yaml is a whole configuration, but there are overrides, too (seed=1). Leave out the "
        "one or the others.\n"
    )
    for text, message in (
        (None, "The configuration config.yaml cannot be read (No such file or directory; from "),
        ("a: [", "The configuration config.yaml is not YAML: "),
        ("- a", "The configuration config.yaml holds no keys. `dynmoe config` prints one."),
        (to_yaml(config).replace("ep_size: 1", "ep_size: 3"), "parallel.ep_size is 3 but must divide the 1000 ranks"),
    ):
        Path("config.yaml").unlink(missing_ok=True)
        if text is not None:
            Path("config.yaml").write_text(text)
        assert main(["train", "--config", "config.yaml"]) == 2
        assert message in capsys.readouterr().err


def test_the_help_lists_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    said = capsys.readouterr().out
    assert "launch=NAME          hosts_openmpi | hosts_pdsh | hosts_torchrun | kubernetes | kubernetes_mpi |" in said
    assert "dynmoe launch --dry-run launch=site.yaml" in said
