"""`dynmoe launch` from outside: what it prints, what it refuses, what it starts here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
import yaml

from dynmoe_ds.cli import train
from dynmoe_ds.cli.main import main
from dynmoe_ds.launching import checks, hosts
from dynmoe_ds.telemetry.run_owner import RunOwnership

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
    assert said.startswith("dynmoe: 3 faults in the configuration:\n")
    for text in ("launch.time is '1:2:3:4'", "parallel.ep_size is 3 but must divide the 2 ranks", "'optim.lrr'"):
        assert text in said
    wrong = ["launch=slurm", "launch.nodes=3", "launch.gpus_per_node=1", "launch.global_batch_size=7"]
    assert main(["launch", *wrong, *SMOKE, "run_dir=runs/a", "seed=1,2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dynmoe: 4 faults in the configuration:\n")
    for text in ("a multiple of launch.nodes (3)", "a multiple of the 4 sequences", "no sbatch on the", "no scontrol"):
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


class Started:
    """The runs that would have been started here."""

    def __init__(self) -> None:
        self.configs: list[Path] = []
        self.codes = [0, 0]

    def __call__(self, arguments: argparse.Namespace) -> int:
        assert arguments.overrides == []
        self.configs.append(Path(arguments.config))
        return self.codes[len(self.configs) - 1]


def test_a_sweep_here_is_one_run_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = Started()
    monkeypatch.setattr(train, "run", started)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    sweep = ["launch", *SMOKE, "run_dir=runs/s", "seed=1,2", "launch.environment=['NOTE=a']"]
    assert main(sweep) == 0
    assert [yaml.safe_load(path.read_text())["seed"] for path in started.configs] == [1, 2]
    assert (tmp_path / "runs" / "s" / "sweep.tsv").read_text() == "run\tseed\n0\t1\n1\t2\n"
    assert os.environ["NOTE"] == "a"
    failing = Started()
    failing.codes = [3, 0]
    monkeypatch.setattr(train, "run", failing)
    assert main(sweep) == 3 and len(failing.configs) == 1


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
