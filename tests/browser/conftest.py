"""The browser of all tests here. They run where Chromium is; `make test-browser` takes its absence for a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Chromium, why_not
from tests.helpers.asked_for import exit_where_asked_for


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    exit_where_asked_for(config, "browser", why_not)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if reason := why_not():
        pytest.skip(reason)
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
