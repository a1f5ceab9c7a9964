"""What is said where there is no browser; no browser is needed for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.browser import chromium, conftest

NO_CHROMIUM = "There is no Chromium and no chromedriver. On Debian: apt-get install chromium chromium-driver."


def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"chromium": "/usr/bin/chromium", "chromedriver": "/usr/bin/chromedriver"}
    monkeypatch.setattr(chromium.shutil, "which", found.get)
    monkeypatch.setattr(chromium, "find_spec", lambda name: None)
    assert str(chromium.why_not()).startswith("There is no selenium. Install this package with its extra `dev`:")
    del found["chromium"]
    assert str(chromium.why_not()).startswith("There is no Chromium. On Debian: apt-get install")
    found.clear()
    assert chromium.why_not() == NO_CHROMIUM


def test_its_absence_is_a_failure_only_where_these_tests_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect(expression: str) -> None:
        conftest.pytest_collection_modifyitems(SimpleNamespace(option=SimpleNamespace(markexpr=expression)))  # type: ignore[arg-type]

    monkeypatch.setattr(conftest, "why_not", lambda: NO_CHROMIUM)
    collect("not cluster")
    with pytest.raises(pytest.exit.Exception, match=NO_CHROMIUM) as left:
        collect("browser")
    assert left.value.returncode == 1
    monkeypatch.setattr(conftest, "why_not", lambda: None)
    collect("browser")
