"""The command from outside: help, exit codes, and messages instead of tracebacks."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_ds.cli import config as config_verb
from dynmoe_ds.cli.main import main
from dynmoe_ds.config.groups import config_groups
from dynmoe_ds.errors import DataError

ROOT = Path(__file__).parents[2]
RUN_DIR = "run_dir=runs/never-made-by-a-test"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DYNMOE_RUN_DIR", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    "verb", [[], ["train"], ["launch"], ["config"], ["tokenize"], ["data", "index"], ["inspect"], ["diff"], ["doctor"]]
)
def test_every_help_has_examples_and_those_with_overrides_list_the_groups(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "example" in text and "  dynmoe " in text
    if verb in ([], ["train"], ["launch"], ["config"]):
        for group, options in config_groups().items():
            assert f"{group}=" in text and " | ".join(options) in " ".join(text.split())
    own = text.splitlines() if len(verb) < 2 else [line for line in text.splitlines() if line.startswith("  ")]
    assert all(len(line) <= 120 for line in own)


def test_verbs_do_not_load_torch_or_hydra_before_they_run() -> None:
    # The package's own __init__ may import the layer; the command's modules must not need more than the errors.
    script = (
        "import sys, types; package = types.ModuleType('dynmoe_ds'); package.__path__ = ['dynmoe_ds']; "
        "sys.modules['dynmoe_ds'] = package; from dynmoe_ds.cli.main import build_parser; "
        "build_parser().format_help(); "
        "print([name for name in ('torch', 'hydra', 'omegaconf', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("argv", [[], ["trian"], ["train", "--fast"]])
def test_a_command_that_cannot_be_read_ends_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: dynmoe" in capsys.readouterr().err


def test_config_prints_yaml_and_ignores_a_stray_local_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--local_rank=1", RUN_DIR, "seed=5"]) == 0
    assert capsys.readouterr().out.startswith("seed: 5\nrun_dir: runs/never-made-by-a-test\n")


@pytest.mark.parametrize("verb", ["config", "train"])
def test_a_users_fault_is_a_message_and_2(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, RUN_DIR, "optim.lrr=1", "parallel.ep_size=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dynmoe: 2 faults in the configuration:\n  - There is no key 'optim.lrr'. Did you mean")
    assert "parallel.ep_size is 3" in error and "Traceback" not in error


def test_ctrl_c_is_a_word_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(config_verb, "run", interrupted)
    assert main(["config"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_every_error_of_the_package_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(arguments: argparse.Namespace) -> int:
        raise DataError("The book is empty. Write one.")

    monkeypatch.setattr(config_verb, "run", failing)
    assert main(["config"]) == 2
    assert capsys.readouterr().err == "dynmoe: The book is empty. Write one.\n"


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dynmoe_ds", "config", "seed=x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "dynmoe: seed is 'x' (text) but must be a whole number.\n"


def test_the_launch_script_starts_the_launcher_with_the_same_command(tmp_path: Path) -> None:
    """A copy of the script, away from the checkout's .venv, with a `deepspeed` that says what it was given."""
    script = tmp_path / "launch" / "local.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "launch" / "local.sh").read_bytes())
    fake = tmp_path / "bin" / "deepspeed"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "<%s>" "$@" "$DYNMOE_RUN_DIR"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "RANKS": "4", "DYNMOE_RUN_DIR": "runs/here"}

    def launch(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, check=False)

    done = launch("experiment=demo", "training.sample_prompt=a b")
    assert done.stdout == (
        "<--no_local_rank><--num_gpus><4><--module><dynmoe_ds><train><experiment=demo><training.sample_prompt=a b>"
        "<parallel.num_ranks=4><runs/here>"
    )
    assert "<runs/local-20" in launch(DYNMOE_RUN_DIR="").stdout
    assert launch("-h").stdout.startswith("usage: ")
    without = launch(PATH="/usr/bin:/bin")
    assert without.returncode == 2 and "there is no deepspeed on the PATH" in without.stderr
    assert os.access(ROOT / "launch" / "local.sh", os.X_OK)


@pytest.mark.parametrize("command", [["plan", "experiment=demo"], ["evaluate", "nowhere"]])
def test_a_machine_without_an_accelerator_is_no_news(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-m", "dynmoe_ds", *command], capture_output=True, text=True, env=environment, timeout=120
    )
    assert "accelerator" not in done.stderr
    assert done.returncode == (0 if command[0] == "plan" else 2)
