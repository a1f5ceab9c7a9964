from __future__ import annotations

import html
import http.client
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.telemetry import live_page
from dynmoe_ds.telemetry.live_page import LivePage, live_server
from dynmoe_ds.telemetry.run_folder import FINISHED_FILE, METRICS_FILE, RunFolder
from tests.telemetry.fake_run import write_fake_run
from tests.telemetry.test_report import Page


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with live_server(tmp_path / "run", 0, 0.01) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        return str(answer.read().decode())


def state_of(page: str) -> tuple[str, str]:
    ((word, told),) = re.findall(r'<p class="state (.*?)">(.*?)</p>', page)
    return word, html.unescape(told)


def test_the_page_follows_the_run_until_its_end(address: str, tmp_path: Path) -> None:
    assert state_of(get(f"{address}/")) == ("not started", "Not started: no metrics.jsonl yet.")
    RunFolder(tmp_path / "run").close()
    assert state_of(get(f"{address}/")) == ("running", "Running: nothing is logged yet.")
    write_fake_run(tmp_path / "run", steps=20, eval_every=0, adapt_every=0)
    first = get(f"{address}/")
    assert "<dd>20</dd>" in first and state_of(first) == ("running", "Running: step 20.")
    assert Page(first).tags.count("img") > 2
    assert '<noscript><meta http-equiv="refresh" content="0.01"></noscript>' in first, "for browsers without scripts"
    write_fake_run(tmp_path / "run", steps=40, eval_every=0, adapt_every=0)
    (tmp_path / "run" / FINISHED_FILE).write_text('{"steps": 40}')
    last = get(f"{address}/")
    assert "<dd>40</dd>" in last and state_of(last) == ("finished", "Finished: all 40 steps are done.")
    for path, code in (("favicon.ico", 204), ("metrics.jsonl", 404)):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request("GET", f"/{path}")
        assert connection.getresponse().status == code


def test_what_cannot_be_read_is_on_the_page_until_it_can(address: str, tmp_path: Path) -> None:
    write_fake_run(tmp_path / "run", steps=10, eval_every=0, adapt_every=0)
    good = (tmp_path / "run" / METRICS_FILE).read_text()
    (tmp_path / "run" / METRICS_FILE).write_text("<oh>\n")
    word, told = state_of(get(f"{address}/"))
    assert word == "failed" and told.startswith("It cannot be shown: ") and "metrics.jsonl, line 1: not JSON" in told
    (tmp_path / "run" / METRICS_FILE).write_text(good)
    assert state_of(get(f"{address}/"))[0] == "running"


def test_it_is_drawn_when_something_changed_and_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(
        live_page, "report_sections", lambda run_dir, _: drawn.append(run_dir) or (f"<i>{len(drawn)}</i>",)
    )
    page, patient = LivePage(tmp_path, 1e-9), LivePage(tmp_path, 3600.0)

    def shown(*pages: LivePage) -> list[str]:
        return [re.findall("<i>(.*)</i>", page.text())[0] for page in pages]

    metrics = tmp_path / METRICS_FILE
    metrics.write_text('{"step": 1, "time_s": 1}\n')
    assert shown(page, page, patient) == ["1", "1", "2"]
    metrics.write_text('{"step": 10, "time_s": 1}\n')
    assert shown(page, patient) == ["3", "2"]
    assert drawn == [tmp_path] * 3
    # The state is told anew each time: silence is what does not change files.
    os.utime(metrics, (0, 0))
    assert [state_of(one.text())[0] for one in (page, patient)] == ["silent", "silent"] and len(drawn) == 3


def test_a_port_that_cannot_be_had(tmp_path: Path) -> None:
    with (
        live_server(tmp_path, 0, 1.0) as server,
        pytest.raises(ConfigError, match=r"--port is \d+, which cannot be had"),
    ):
        live_server(tmp_path, server.server_port, 1.0)
    with pytest.raises(ConfigError, match="--port is 70000, which cannot be had"):
        live_server(tmp_path, 70000, 1.0)
