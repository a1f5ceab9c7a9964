"""The browser of all tests here. They run where Chromium is; `make test-browser` takes its absence for a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Chromium, why_not


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if config.option.markexpr == "browser" and (reason := why_not()):
        pytest.exit(reason, returncode=1)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if reason := why_not():
        pytest.skip(reason)
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
