"""`make test-docker` takes the absence of podman for a failure; `make test` skips what needs it."""

from __future__ import annotations

import pytest

from tests.docker.podman import why_not
from tests.helpers.asked_for import exit_where_asked_for


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    exit_where_asked_for(config, "docker", why_not)
