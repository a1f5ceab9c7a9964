import importlib.metadata
from pathlib import Path

import pytest

from dynmoe_ds.integrations.megatron import DISTRIBUTION, find_megatron


def is_installed() -> bool:
    return any(found.metadata["Name"] == DISTRIBUTION for found in importlib.metadata.distributions())


def test_an_installed_megatron_core_is_told_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution as pip leaves it; its code is not looked at."""
    info = tmp_path / "megatron_core-0.16.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.16.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_megatron() == "0.16.1"


def test_no_megatron_core_is_none() -> None:
    if is_installed():
        pytest.skip("megatron-core is installed here")
    assert find_megatron() is None
