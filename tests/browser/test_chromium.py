"""What is said where there is no browser; no browser is needed for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import chromium

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(("options", "code"), [((), 0), (("-m", "browser"), 1)])
def test_without_a_browser_tests_are_skipped_unless_they_are_asked_for(
    options: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    chosen = "tests/browser/test_reports_in_a_browser.py"
    command = [sys.executable, "-m", "pytest", chosen, *options, "-p", "no:cacheprovider", "-k", "dark", "-ra"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert NO_CHROMIUM in done.stdout and done.returncode == code, done.stdout + done.stderr
