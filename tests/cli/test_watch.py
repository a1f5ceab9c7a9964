"""`dynmoe watch`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tests.telemetry.fake_run import write_fake_run

from dynmoe_ds.cli.main import main


@pytest.mark.parametrize("has_begun", [True, False])
def test_it_serves_until_ctrl_c(has_begun: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if has_begun:
        write_fake_run(run, steps=10, eval_every=0, adapt_every=0)
    command = [sys.executable, "-m", "dynmoe_ds", "watch", f"{run}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        match = re.fullmatch(
            r"dynmoe: (http://127\.0\.0\.1:\d+/) shows .*run(, which has nothing to show yet)?; Ctrl-C ends\n", told
        )
        assert match and bool(match[2]) is not has_begun, told
        with urllib.request.urlopen(match[1], timeout=60) as answer:
            assert b"Run run" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("\n", "")
        assert process.returncode == 0
    finally:
        process.kill()


def test_what_cannot_be_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_fake_run(tmp_path / name, steps=5, eval_every=0, adapt_every=0)
    assert main(["watch", f"{tmp_path}"]) == 2
    assert "holds 2 runs. Name one of them, such as" in capsys.readouterr().err
    assert main(["watch", f"{tmp_path / 'a'}", "--every", "0"]) == 2
    assert "--every is 0 but must be above 0." in capsys.readouterr().err
    assert main(["watch", f"{tmp_path / 'gone'}"]) == 2
    assert "gone is no folder (seen from" in capsys.readouterr().err
