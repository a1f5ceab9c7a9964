from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from dynmoe_ds.errors import ConfigError
from dynmoe_ds.telemetry import live_page
from dynmoe_ds.telemetry.live_page import LivePage, live_server
from dynmoe_ds.telemetry.run_folder import FINISHED_FILE, METRICS_FILE, RunFolder
from tests.telemetry.fake_run import write_fake_run
from tests.telemetry.test_report import Page

REFRESH = '<meta http-equiv="refresh" content="0.01">'


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


def test_the_page_follows_the_run_until_its_end(address: str, tmp_path: Path) -> None:
    with pytest.raises(HTTPError) as early:
        get(f"{address}/")
    waiting = early.value.read().decode()
    assert early.value.code == 503 and "run has no metrics.jsonl" in waiting and REFRESH in waiting
    RunFolder(tmp_path / "run").close()
    assert REFRESH in get(f"{address}/")  # with nothing logged yet
    write_fake_run(tmp_path / "run", steps=20, eval_every=0, adapt_every=0)
    first = get(f"{address}/")
    assert "<dd>20</dd>" in first and REFRESH in first and Page(first).tags.count("img") > 2
    write_fake_run(tmp_path / "run", steps=40, eval_every=0, adapt_every=0)
    (tmp_path / "run" / FINISHED_FILE).write_text("{}")
    last = get(f"{address}/")
    assert "<dd>40</dd>" in last and "refresh" not in last
    with pytest.raises(HTTPError) as other:
        get(f"{address}/metrics.jsonl")
    assert other.value.code == 404


def test_it_is_drawn_when_something_changed_and_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float | None] = []
    monkeypatch.setattr(live_page, "report_text", lambda run_dir, refresh_s: drawn.append(refresh_s) or f"{len(drawn)}")
    page, patient = LivePage(tmp_path, 1e-9), LivePage(tmp_path, 3600.0)
    (tmp_path / METRICS_FILE).write_text("a")
    assert [page.text(), page.text(), patient.text()] == ["1", "1", "2"]
    (tmp_path / METRICS_FILE).write_text("ab")
    assert [page.text(), patient.text()] == ["3", "2"]
    assert drawn == [1e-9, 3600.0, 1e-9]


def test_a_port_that_cannot_be_had(tmp_path: Path) -> None:
    with (
        live_server(tmp_path, 0, 1.0) as server,
        pytest.raises(ConfigError, match=r"--port is \d+, which cannot be had"),
    ):
        live_server(tmp_path, server.server_port, 1.0)
    with pytest.raises(ConfigError, match="--port is 70000, which cannot be had"):
        live_server(tmp_path, 70000, 1.0)
