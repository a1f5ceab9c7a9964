"""A headless Chromium, and what a page does in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_DRIVER = "chromedriver"
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TIMEOUT_S = 60


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def why_not() -> str | None:
    """What is missing for a test in a browser, in one sentence; None if nothing is."""
    missing = [name for name, path in (("Chromium", _browser()), (_DRIVER, shutil.which(_DRIVER))) if path is None]
    if missing:
        return f"There is no {' and no '.join(missing)}. On Debian: apt-get install chromium chromium-driver."
    if find_spec("selenium") is None:
        return "There is no selenium. Install this package with its extra `dev`: pip install -e '.[dev]'."
    return None


class Chromium:
    """One browser for several pages; `folder` holds all it writes."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = f"{_browser()}"
        for option in (*_OPTIONS, f"--user-data-dir={folder}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._driver = webdriver.Chrome(options=options, service=Service(f"{shutil.which(_DRIVER)}"))

    def open(self, address: str | Path, *, width: int = 1280, is_dark: bool = False) -> None:
        """Load a page, or a file, and wait until it is there. Complaints of the page before are forgotten."""
        self._driver.get("about:blank")
        self.complaints()
        self._driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._driver.get(address.resolve().as_uri() if isinstance(address, Path) else address)

    def run(self, script: str) -> Any:
        """What a line of JavaScript gives."""
        return self._driver.execute_script(f"return {script}")

    def text(self) -> str:
        """What a reader can read."""
        return str(self.run("document.body.innerText"))

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Raises: AssertionError with what the page says instead."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.wait import WebDriverWait

        try:
            WebDriverWait(self._driver, TIMEOUT_S, poll_frequency=0.05).until(lambda _: holds())
        except TimeoutException:
            raise AssertionError(f"{what} is not on the page:\n{self.text()}") from None

    def wait_for(self, words: str) -> None:
        self.wait_until(lambda: words in self.text(), words)

    def complaints(self) -> list[str]:
        """What the browser's console has been told since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def close(self) -> None:
        self._driver.quit()
