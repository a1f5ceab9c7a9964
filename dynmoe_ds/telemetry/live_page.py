"""The report of a run while it goes on, served to a browser on this machine."""

from __future__ import annotations

import html
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dynmoe_ds.errors import ConfigError, DynMoEError
from dynmoe_ds.telemetry.page import page
from dynmoe_ds.telemetry.report import report_text
from dynmoe_ds.telemetry.run_folder import ANSWERS_FILE, FINISHED_FILE, LINE_FILES, SAMPLE_FILE


class LivePage:
    """What a browser is shown of a run: its report, drawn anew when its folder has changed, at most every `every_s`.

    The page asks for itself again after `every_s`, until the run has come to its end. Threads may ask at once.
    """

    def __init__(self, run_dir: str | Path, every_s: float) -> None:
        self._folder, self._every_s = Path(run_dir), every_s
        self._lock = threading.Lock()
        self._drawn: tuple[tuple[int, ...], float, str] | None = None

    def text(self) -> str:
        """The page as it is now. Raises: DataError while the folder cannot be read."""
        with self._lock:
            state = self._state()
            if self._drawn is not None:
                before, at, text = self._drawn
                if before == state or time.monotonic() - at < self._every_s:
                    return text
            is_over = (self._folder / FINISHED_FILE).exists()
            text = report_text(self._folder, refresh_s=None if is_over else self._every_s)
            self._drawn = state, time.monotonic(), text
            return text

    def _state(self) -> tuple[int, ...]:
        """Changes whenever something that the page shows does."""
        files = [self._folder / name for name in (*LINE_FILES, SAMPLE_FILE, ANSWERS_FILE, FINISHED_FILE)]
        return tuple(file.stat().st_size if file.exists() else -1 for file in files)

    def waiting_text(self, error: DynMoEError) -> str:
        """A page that says why there is nothing to show yet, and asks again."""
        return page(f"Run {self._folder.resolve().name}", [f"<p>{html.escape(f'{error}')}</p>"], self._every_s)


def live_server(run_dir: str | Path, port: int, every_s: float) -> ThreadingHTTPServer:
    """A server on this machine's own address alone; port 0 takes a free one. `serve_forever()` runs it.

    Raises: ConfigError for a port that cannot be had.
    """
    live = LivePage(run_dir, every_s)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                self._answer(HTTPStatus.OK, live.text())
            except DynMoEError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, live.waiting_text(error))

        def _answer(self, status: HTTPStatus, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", f"{len(body)}")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A line per request would bury what the terminal is for."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port is {port}, which cannot be had: {error}. Use another, or 0 for a free one."
        ) from error
