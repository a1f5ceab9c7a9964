"""What the doctor finds, with the machine replaced where it matters."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import time
from pathlib import Path

import pytest
import torch

from dynmoe_ds.cli import doctor


def test_this_machine_is_fine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "extensions_folder", lambda: Path("/nonexistent"))
    assert doctor.run(argparse.Namespace()) == 0
    text = capsys.readouterr().out
    for subject in ("python", "torch", "deepspeed", "transformers", "accelerator", "gloo", "nccl", "apex"):
        assert f" {subject} " in text
    assert text.endswith("Everything a run needs is here.\n")


def test_a_missing_package_and_a_wrong_version_are_named_and_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["torch==2.13.*", "no-such-package>=5", "numpy<1", "pytest; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: required)
    monkeypatch.setattr(doctor, "device_findings", lambda: iter(()))
    findings = {finding.subject: finding for finding in doctor.package_findings()}
    assert findings["torch"].state == "ok"
    assert findings["no-such-package"].text == "run `pip install 'no-such-package>=5'`"
    assert findings["numpy"].state == "missing" and "but run `pip install 'numpy<1'`" in findings["numpy"].text
    assert "pytest" not in findings
    assert doctor.run(argparse.Namespace()) == 1
    assert "Missing: no-such-package, numpy." in capsys.readouterr().out


def test_without_an_installation_the_packages_are_still_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    findings = {finding.subject: finding.state for finding in doctor.package_findings()}
    assert findings["dynmoe-ds"] == "note" and findings["deepspeed"] == "ok"


def test_nccl_is_needed_where_there_are_gpus_and_gloo_where_there_are_none() -> None:
    assert doctor._backend("nccl", False, "use", needed=True).state == "missing"
    assert doctor._backend("nccl", False, "use", needed=False).state == "note"
    assert doctor._backend("gloo", True, "use", needed=True).state == "ok"


def test_a_deepspeed_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "no_such_device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    accelerator = next(iter(doctor.device_findings()))
    assert accelerator.state == "missing" and accelerator.text.startswith("deepspeed cannot be imported: ")


@pytest.mark.parametrize(
    ("content", "state", "text"),
    [
        ("class FusedAdam: pass", "ok", "apex.optimizers.FusedAdam is available"),
        ("", "note", "is not NVIDIA's"),
        ("import velruse_is_not_here", "note", "is not NVIDIA's"),
    ],
)
def test_apex_is_told_by_its_class(
    content: str, state: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(doctor.sys.modules, name, raising=False)
    (finding,) = doctor.apex_findings()
    assert finding.state == state and text in finding.text
    for name in ("apex", "apex.optimizers"):
        doctor.sys.modules.pop(name, None)


def test_no_apex_is_fine() -> None:
    if doctor.importlib.util.find_spec("apex") is not None:
        pytest.skip("apex is installed here")
    (finding,) = doctor.apex_findings()
    assert finding.state == "ok" and "optional" in finding.text


def test_locks_are_told_by_their_age(tmp_path: Path) -> None:
    assert [finding.text for finding in doctor.lock_findings(tmp_path)] == ["no locks"]
    young, old = tmp_path / "py311_cpu" / "young" / "lock", tmp_path / "py311_cpu" / "old" / "lock"
    for lock in (young, old):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (time.time() - 3600,) * 2)
    found_old, found_young = doctor.lock_findings(tmp_path)
    assert found_old.state == "note" and f"run `rm {old}`" in found_old.text and "60 minutes" in found_old.text
    assert found_young.state == "ok" and "in progress" in found_young.text


def test_the_extensions_folder_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    assert doctor.extensions_folder() == Path("/somewhere")
