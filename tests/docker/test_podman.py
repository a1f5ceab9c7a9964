"""What `make test-docker` says where it cannot do its work."""

from __future__ import annotations

import pytest

from tests.docker import podman


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
