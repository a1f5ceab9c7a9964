"""`dynmoe watch`'s page while a run goes on, as a reader sees it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynmoe_ds.telemetry.live_page import live_server
from dynmoe_ds.telemetry.run_folder import CONFIG_FILE, FINISHED_FILE, LINE_FILES, RunFolder
from dynmoe_ds.telemetry.run_state import forget_stop, note_stop
from tests.browser.chromium import Chromium
from tests.telemetry.fake_run import write_fake_run

pytestmark = pytest.mark.browser

STEPS = 60
# What happens on the page from now on: jumps of what is on it, and pictures that come before they are decoded.
WATCH = """(window.isFirstLoad = true, window.jumps = 0, window.blank = 0,
  new PerformanceObserver(all => all.getEntries().forEach(one => window.jumps += one.value))
    .observe({type: "layout-shift"}),
  new MutationObserver(all => all.forEach(one => one.addedNodes.forEach(node => {
    if (node.querySelectorAll) node.querySelectorAll("img").forEach(image => window.blank += !image.complete);
  }))).observe(document.querySelector("main"), {childList: true}))"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, Callable[[], None]]]:
    """The folder of a run that has not begun, the address of its page, and what stops the server."""
    run = tmp_path / "run"
    with live_server(run, 0, 0.5) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()

        yield run, f"http://127.0.0.1:{server.server_port}/", stop
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at its end, of whose lines a run that goes on has the first ones."""
    folder = tmp_path_factory.mktemp("whole")
    return write_fake_run(folder, steps=STEPS, log_every=2, eval_every=10, adapt_every=4, num_layers=1)


def train_until(step: int, run: Path, whole: Path) -> None:
    """Append the lines that a run writes until `step`, and first what it writes before them."""
    if not (run / CONFIG_FILE).exists():
        folder = RunFolder(run)
        folder.write_config(f"training: {{steps: {STEPS}}}\n")
        folder.close()
    for name in LINE_FILES:
        with open(run / name, "r+") as file:
            num_there = len(file.readlines())
            lines = (whole / name).read_text().splitlines(keepends=True)[num_there:]
            file.writelines(line for line in lines if json.loads(line)["step"] <= step)


def test_a_run_from_its_first_line_to_its_last(
    chromium: Chromium, served: tuple[Path, str, Callable[[], None]], whole: Path
) -> None:
    run, address, _ = served
    chromium.open(address)
    chromium.wait_for("Not started: no metrics.jsonl yet.")
    chromium.run(WATCH)
    train_until(0, run, whole)
    chromium.wait_for("Running: nothing is logged yet.")
    train_until(20, run, whole)
    chromium.wait_for("Running: step 20 of 60, about 8 s left.")
    assert chromium.run("document.images.length") > 5

    # What a reader has opened, and where he is on the page and in the list of births, stays; all pictures are new.
    chromium.run("(document.querySelector('details').open = true, window.scrollTo(0, 1200), window.jumps = 0)")
    chromium.run("document.styleSheets[0].insertRule('.scroll { max-height: 3rem !important; }')")
    chromium.run("document.querySelector('.scroll').scrollTop = 30")
    place = chromium.run("document.images[3].getBoundingClientRect().top")
    train_until(50, run, whole)
    chromium.wait_for("Running: step 50 of 60")
    assert chromium.run("window.isFirstLoad") is True, "the page was loaded anew"
    assert chromium.run("document.querySelector('details').open") is True
    assert chromium.run("document.querySelector('.scroll').scrollTop") == 30
    assert chromium.run("document.images[3].getBoundingClientRect().top") == pytest.approx(place, abs=40)
    assert chromium.run("window.blank") == 0, "a picture was shown before it was decoded"
    assert chromium.run("window.jumps") < 0.1
    assert chromium.run("document.querySelectorAll('h1').length") == 1

    for name in LINE_FILES:
        os.utime(run / name, (0, 0))
    chromium.wait_for("Silent: no new line for")
    note_stop(run, 1, "RuntimeError: out of <memory>")
    chromium.wait_for("Failed at step 50 of 60. RuntimeError: out of <memory>")
    forget_stop(run)
    train_until(60, run, whole)
    (run / FINISHED_FILE).write_text('{"steps": 60}')
    chromium.wait_for("Finished: all 60 steps are done.")
    chromium.wait_for("As of ")
    assert chromium.run("window.isFirstLoad") is True
    assert chromium.complaints() == []


def test_the_page_stays_when_nobody_answers_any_more(
    chromium: Chromium, served: tuple[Path, str, Callable[[], None]]
) -> None:
    run, address, stop = served
    RunFolder(run).append_metrics(20, {"train/loss": 3.0}, time_s=1.0)
    chromium.open(address)
    chromium.wait_for("again every 0.5 s")
    stop()
    chromium.wait_for("Is “dynmoe watch” still running?")
    assert "Running: step 20." in chromium.text() and chromium.run("document.images.length") == 1
