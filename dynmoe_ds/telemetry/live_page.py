"""The report of a run while it goes on, served to a browser on this machine."""

from __future__ import annotations

import html
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dynmoe_ds.errors import ConfigError, DynMoEError
from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.page import page
from dynmoe_ds.telemetry.report import report_sections, report_title
from dynmoe_ds.telemetry.run_folder import ANSWERS_FILE, LINE_FILES, METRICS_FILE, SAMPLE_FILE
from dynmoe_ds.telemetry.run_state import Progress, RunState, read_progress, read_state

# Asks for the page again and again, and puts what is new in the place of what it was, picture by picture and not before
# they are decoded: what a reader looks at, has scrolled to or has opened stays, and nothing flickers. A server that is
# gone leaves what was shown. Without scripts the page is loaded anew.
_SCRIPT = """<p id="look" class="soft" data-every-s="EVERY"></p>
<noscript><meta http-equiv="refresh" content="EVERY"></noscript>
<script>
const look = document.getElementById("look"), main = document.querySelector("main");
const everyS = Number(look.dataset.everyS), time = () => new Date().toLocaleTimeString();
const sources = new Map([...main.children].map(part => [part, part.outerHTML]));  // as they came
const isOver = root => root.querySelector(".state.finished") !== null;
let seen = time();
function say() {
  look.textContent = isOver(main) ? `As of ${seen}.` : `Looked at ${seen}, again every ${everyS} s.`;
}
async function follow() {
  try {
    const answer = await fetch(location.href, {cache: "no-store"});
    const other = new DOMParser().parseFromString(await answer.text(), "text/html");
    const parts = [...other.querySelector("main").children];
    const texts = parts.map(part => part.outerHTML);
    const known = new Set(sources.values());
    parts.forEach(part => document.adoptNode(part));
    const images = parts.filter((part, i) => !known.has(texts[i])).flatMap(part => [...part.querySelectorAll("img")]);
    await Promise.allSettled(images.map(image => image.decode()));
    put(parts, texts);
    seen = time();
    say();
    if (isOver(main)) return;
  } catch (error) {
    look.textContent = `No answer since ${seen}. Is \u201cdynmoe watch\u201d still running?`;
  }
  setTimeout(follow, 1000 * everyS);
}
function put(parts, texts) {
  const boxes = () => [...main.querySelectorAll(".scroll, .wide")];
  const places = boxes().map(box => [box.scrollTop, box.scrollLeft]);
  const opened = [...main.querySelectorAll("details[open] > summary")].map(summary => summary.textContent);
  for (const part of [...main.children]) if (!texts.includes(sources.get(part))) part.remove();
  let next = main.firstElementChild;
  parts.forEach((part, i) => {
    if (next !== null && sources.get(next) === texts[i]) { next = next.nextElementSibling; return; }
    main.insertBefore(part, next);
    sources.set(part, texts[i]);
  });
  while (next !== null) { const gone = next; next = next.nextElementSibling; gone.remove(); }
  for (const summary of main.querySelectorAll("details > summary"))
    if (opened.includes(summary.textContent)) summary.parentElement.open = true;
  boxes().forEach((box, i) => { [box.scrollTop, box.scrollLeft] = places[i] ?? [0, 0]; });
}
say();
if (!isOver(main)) setTimeout(follow, 1000 * everyS);
</script>
"""


class LivePage:
    """What a browser is shown of a run: its state and its report, which is drawn anew when its folder has changed, at
    most every `every_s`.

    The page asks for itself again after `every_s`, until the run has come to its end. Threads may ask at once.
    """

    def __init__(self, run_dir: str | Path, every_s: float) -> None:
        self._folder, self._every_s = Path(run_dir), every_s
        self._lock = threading.Lock()
        self._drawn: tuple[tuple[int, ...], float, Progress, tuple[str, ...]] | None = None

    def text(self) -> str:
        """The page as it is now; what is wrong where the folder cannot be read."""
        with self._lock:
            try:
                progress, sections = self._report()
                state = read_state(self._folder, progress)
            except DynMoEError as error:
                state, sections = RunState(word="failed", told=f"It cannot be shown: {error}"), ()
        told = f'<p class="state {state.word}">{html.escape(state.told)}</p>'
        script = _SCRIPT.replace("EVERY", f"{self._every_s:g}")
        return page(report_title(self._folder), (told, *sections), script)

    def _report(self) -> tuple[Progress, tuple[str, ...]]:
        """How far the run is, and what there is to see of it. Raises: DataError for lines that are broken."""
        files = self._sizes()
        if self._drawn is not None:
            before, at, progress, sections = self._drawn
            if before == files or time.monotonic() - at < self._every_s:
                return progress, sections
        progress, sections = read_progress(self._folder), ()
        if (self._folder / METRICS_FILE).exists():
            sections = report_sections(self._folder, read_history(self._folder))
        self._drawn = files, time.monotonic(), progress, sections
        return progress, sections

    def _sizes(self) -> tuple[int, ...]:
        """Changes whenever something that the report shows does."""
        files = [self._folder / name for name in (*LINE_FILES, SAMPLE_FILE, ANSWERS_FILE)]
        return tuple(file.stat().st_size if file.exists() else -1 for file in files)


def live_server(run_dir: str | Path, port: int, every_s: float) -> ThreadingHTTPServer:
    """A server on this machine's own address alone; port 0 takes a free one. `serve_forever()` runs it.

    Raises: ConfigError for a port that cannot be had.
    """
    live = LivePage(run_dir, every_s)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer(HTTPStatus.OK, live.text())
            elif self.path == "/favicon.ico":
                self._answer(HTTPStatus.NO_CONTENT, "")  # which every browser asks for
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

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
