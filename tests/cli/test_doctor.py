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
    assert doctor.run(argparse.Namespace(overrides=[])) == 0
    text = capsys.readouterr().out
    for subject in (
        "python",
        "torch",
        "deepspeed",
        "transformers",
        "accelerator",
        "gloo",
        "nccl",
        "bfloat16 on the CPU",
        "apex",
        "megatron-core",
    ):
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
    assert doctor.run(argparse.Namespace(overrides=[])) == 1
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
    ("capabilities", "state", "text"),
    [
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, "ok", "in hardware (avx512_bf16)"),
        ({"avx512_bf16": True, "amx_bf16": True}, "ok", "in hardware (amx_bf16, avx512_bf16)"),
        ({"architecture": "aarch64", "bf16": True}, "ok", "in hardware (bf16)"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "note", "this processor has no arithmetic for it"),
    ],
)
def test_bfloat16_is_known_to_be_fast_or_slow(
    capabilities: dict[str, object], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    finding = doctor.bfloat16_finding()
    assert finding.state == state and finding.text.startswith(text)
    assert (state == "note") == ("parallel.dtype=float32 is the faster one" in finding.text)


def test_what_torch_says_of_this_processor_is_what_the_kernel_says() -> None:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = information.read_text().split()
    has_arithmetic = not {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}.isdisjoint(flags)
    assert (doctor.bfloat16_finding().state == "ok") == has_arithmetic


@pytest.mark.parametrize(
    ("whose", "state", "text"),
    [
        ("absent", "ok", "not installed; optional"),
        ("nvidia", "ok", "apex.optimizers.FusedAdam is available"),
        ("stranger", "note", "a package called apex is installed that is not NVIDIA's; run `pip uninstall apex`"),
    ],
)
def test_apex_is_reported(whose: str, state: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmoe_ds.integrations.apex.find_apex", lambda: whose)
    finding = next(iter(doctor.integration_findings()))
    assert (finding.subject, finding.state, finding.text) == ("apex", state, text)


@pytest.mark.parametrize(("version", "text"), [(None, "not installed; optional"), ("0.16.1", "0.16.1")])
def test_megatron_core_is_reported(version: str | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmoe_ds.integrations.megatron.find_megatron", lambda: version)
    *_, finding = doctor.integration_findings()
    assert (finding.subject, finding.state, finding.text) == ("megatron-core", "ok", text)


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
