"""`make test-docker` takes the absence of podman for a failure; `make test` skips what needs it."""

from __future__ import annotations

import pytest

from tests.docker.podman import why_not


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if config.option.markexpr == "docker" and (reason := why_not()):
        pytest.exit(reason, returncode=1)
