"""What the build of the GPU image keeps of its base: in packages made up here."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.loaded import gpu_base
from tests.helpers.fake_apex import write_fake_apex

ROOT = Path(__file__).parents[2]
BASE = {
    "torch": "2.13.0a0+8145d630e8.nv26.6", "apex": "0.1", "transformer-engine": "2.16.0+4220403e", "numpy": "1.26.4",
    "torchvision": "0.27.0a0+1", "nvidia-dali-cuda130": "2.1.0", "cuda-python": "13.3.1", "tensorrt": "11.0",
    "click": "8.1.8", "nvidiable": "1.0", "torchmetrics": "1.8",
}  # fmt: skip
OURS = {"torch": "2.13.0", "numpy": "2.4.6", "click": "8.5.1", "transformers": "5.23.0", "hydra-core": "1.3.8"}


def test_nvidias_packages_stay_ours_are_added_and_the_rest_is_pips_to_choose() -> None:
    assert gpu_base.pins(BASE, OURS) == {
        "torch": "2.13.0a0+8145d630e8.nv26.6", "apex": "0.1", "transformer-engine": "2.16.0+4220403e",
        "numpy": "1.26.4", "torchvision": "0.27.0a0+1", "nvidia-dali-cuda130": "2.1.0", "cuda-python": "13.3.1",
        "tensorrt": "11.0", "transformers": "5.23.0", "hydra-core": "1.3.8",
    }  # fmt: skip


def test_names_and_comments_are_read_as_pip_does(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# ours\nPyYAML==6.0.3\n\nhf_xet==1.8.0  # Hugging Face's\n")
    assert gpu_base.read(tmp_path / "constraints.txt") == {"pyyaml": "6.0.3", "hf-xet": "1.8.0"}


def test_what_pip_replaced_is_named() -> None:
    assert list(gpu_base.faults(BASE, BASE | {"transformers": "5.23.0"})) == []
    assert list(gpu_base.faults(BASE, BASE | {"torch": "2.13.0"})) == [
        "torch is 2.13.0, but it was to stay 2.13.0a0+8145d630e8.nv26.6."
    ]


def test_a_base_without_apex_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "constraints.txt").write_text("torch==0.4\n")
    assert gpu_base.main("check", tmp_path / "constraints.txt") == 1
    said = capsys.readouterr().err
    assert "it was to stay 0.4." in said
    assert "The base has no apex.optimizers.FusedAdam of NVIDIA's apex, or not its extension amp_C." in said
    assert "The base has no apex.normalization.FusedRMSNorm" in said
    assert "The base has no Transformer Engine." in said


def test_a_base_with_both_is_taken(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    write_fake_apex(tmp_path)
    (tmp_path / "ours.txt").write_text("pytest==0.1\nnot-here==7\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"{ROOT}/docker/gpu_base.py", *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)

    (tmp_path / "constraints.txt").write_text(run("pin", "ours.txt").stdout)
    pinned = gpu_base.read(tmp_path / "constraints.txt")
    assert pinned["torch"] == importlib.metadata.version("torch")
    assert pinned["not-here"] == "7" and "pytest" not in pinned
    assert run("check", "constraints.txt").stderr == "torch, apex and Transformer Engine are the base's.\n"
