import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_ds.integrations.apex import find_apex


@pytest.mark.parametrize(
    ("content", "whose"),
    [
        ("class FusedAdam: pass", "nvidia"),
        ("", "stranger"),
        ("import velruse_is_not_here", "stranger"),
    ],
)
def test_apex_is_told_by_its_class(content: str, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "optimizers.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = find_apex()
    for name in ("apex", "apex.optimizers"):
        sys.modules.pop(name, None)
    assert found == whose


def test_no_apex_is_absent() -> None:
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("apex is installed here")
    assert find_apex() == "absent"


def test_frameworks_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys, dynmoe_ds.cli.main, dynmoe_ds.engine, dynmoe_ds.training; "
        "print([m for m in sys.modules if m.split('.')[0] in ('apex', 'amp_C', 'megatron')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
