"""What `make test-docker` says where it cannot do its work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.docker import conftest, podman


def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None if name in ("podman", "debootstrap") else f"/bin/{name}")
    assert podman.why_not() == (
        "There is no podman and no debootstrap. On Debian: apt-get install podman podman-compose runc debootstrap "
        "netavark aardvark-dns."
    )
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert podman.why_not() is None
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert podman.why_not() == "Images are built and run as root here, and this is another user."


def test_its_absence_is_a_failure_only_where_these_tests_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(expression: str) -> None:
        conftest.pytest_collection_modifyitems(SimpleNamespace(option=SimpleNamespace(markexpr=expression)))  # type: ignore[arg-type]

    monkeypatch.setattr(conftest, "why_not", lambda: "There is no podman.")
    collect("not cluster")
    with pytest.raises(pytest.exit.Exception, match=r"There is no podman\.") as left:
        collect("docker")
    assert left.value.returncode == 1
    monkeypatch.setattr(conftest, "why_not", lambda: None)
    collect("docker")
