"""What is said where there is no browser; no browser is needed for it."""

from __future__ import annotations

import pytest

from tests.browser import chromium


def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"chromium": "/usr/bin/chromium", "chromedriver": "/usr/bin/chromedriver"}
    monkeypatch.setattr(chromium.shutil, "which", found.get)
    monkeypatch.setattr(chromium, "find_spec", lambda name: None)
    assert str(chromium.why_not()).startswith("There is no selenium. Install this package with its extra `dev`:")
    del found["chromium"]
    assert str(chromium.why_not()).startswith("There is no Chromium. On Debian: apt-get install")
    found.clear()
    assert chromium.why_not() == (
        "There is no Chromium and no chromedriver. On Debian: apt-get install chromium chromium-driver."
    )
