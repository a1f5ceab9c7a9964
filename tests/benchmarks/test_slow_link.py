"""The slow link is slow, and every way to send over it is compared with the first of its kind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import slow_link
from benchmarks.side_by_side import RankFailed
from benchmarks.slow_link import GROUPS, Sizes, SlowLink, await_ranks, draw, lines, run, why_not

ROOT = Path(__file__).parents[2]
SEND = """
import socket
cable = socket.create_connection(("10.89.0.2", 5000))
cable.sendall(bytes({size}))
cable.recv(1)
"""
TAKE = """
import socket, time
server = socket.create_server(("10.89.0.2", 5000))
print("ready", flush=True)
cable, left = server.accept()[0], {size}
began = time.perf_counter()
while left:
    left -= len(cable.recv(1 << 16))
print(time.perf_counter() - began)
cable.send(b"1")
"""


@pytest.fixture
def hosts() -> None:
    if why := why_not():
        pytest.skip(why)


def test_the_cable_carries_what_it_is_said_to(hosts: None) -> None:
    size = 2_000_000
    with SlowLink(40) as link:
        first, second = (["ip", "netns", "exec", space, sys.executable, "-c"] for space in link.spaces)
        with subprocess.Popen([*second, TAKE.format(size=size)], stdout=subprocess.PIPE, text=True) as taker:
            assert taker.stdout is not None and taker.stdout.readline() == "ready\n"
            subprocess.run([*first, SEND.format(size=size)], check=True, timeout=60)
            seconds = float(taker.stdout.readline())
    # 16 megabits at 40 a second; the first 128 KB may pass at once.
    assert seconds > 0.3, f"{8 * size / seconds / 1e6:.0f} megabits a second"
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(space in spaces for space in link.spaces), "a namespace is left behind"


@pytest.mark.timeout(300)
def test_every_way_runs_and_is_reported(hosts: None, tmp_path: Path) -> None:
    words = ["--quick", "--megabits", "1000", "--k", "2", "--output", f"{tmp_path}"]
    command = [sys.executable, "-m", "benchmarks.slow_link", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads((tmp_path / "slow_link.json").read_text())["cells"]
    assert [list(cell["seconds"]) for cell in cells] == [
        [name for group in list(GROUPS.values())[:2] for name in group],
        list(list(GROUPS.values())[2]),
    ]
    assert (tmp_path / "slow_link.png").read_bytes().startswith(b"\x89PNG")


def test_a_rank_that_fails_ends_the_others(hosts: None) -> None:
    with pytest.raises(RankFailed, match=r"(?s)Rank \d of 2 failed.*num_slots is 7 but must be a multiple"):
        run(1000, 1, Sizes(tokens=8, hidden=8, ffn=8, num_experts=7), timeout_s=60)


def _python(what: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, "-c", what], stdout=file, stderr=file)


def test_ranks_that_have_all_failed_before_the_first_look_are_reported(tmp_path: Path) -> None:
    logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    ranks = [_python(f"raise SystemExit('words of {i}')", log) for i, log in enumerate(logs)]
    for rank in ranks:
        rank.wait(timeout=30)
    with pytest.raises(RankFailed, match=r"(?s)Rank 0 of 2 failed:\nwords of 0.*Rank 1 of 2 failed:\nwords of 1"):
        await_ranks(ranks, logs, timeout_s=30)


def test_ranks_that_are_late_are_reported_with_what_they_said(tmp_path: Path) -> None:
    log = tmp_path / "0.txt"
    with _python("import time; print('begun', flush=True); time.sleep(600)", log) as rank:
        try:
            deadline = time.monotonic() + 60
            while "begun" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            with pytest.raises(RankFailed, match=r"Rank 0 of 1 did not finish within 0\.1 s:\nbegun"):
                await_ranks([rank], [log], timeout_s=0.1)
        finally:
            rank.kill()


def test_the_tables_give_ratios_to_the_first_of_each_kind(tmp_path: Path) -> None:
    def cell(ranks: int, **seconds: float) -> dict[str, object]:
        spread = {name: {"least": least, "median": 1.0, "most": 2.0} for name, least in seconds.items()}
        return {"megabits": 100, "ranks": ranks, "k": 2, "seconds": spread}

    near = dict(zip([*GROUPS[slow_link.ONE_CHUNK], *GROUPS[slow_link.AFTER]], (0.4, 0.3, 0.2, 0.8, 0.4), strict=True))
    cells = [cell(2, **near), cell(4, **dict(zip(GROUPS[slow_link.FLAT], (0.5, 0.4), strict=True)))]
    page = list(lines(cells))
    assert "| 100 | 2 | 1.00: 400 (2000) | 0.75: 300 (2000) | 0.50: 200 (2000) |" in page
    assert "| 100 | 2 | 1.00: 800 (2000) | 0.50: 400 (2000) |" in page
    assert "| 100 | 2 | 1.00: 500 (2000) | 0.80: 400 (2000) |" in page
    assert draw(cells, tmp_path / "ratios.png").exists()


def test_another_user_than_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_link.os, "geteuid", lambda: 1000)
    assert why_not() == "Network namespaces are made as root, and this is another user."
    monkeypatch.setattr(slow_link.os, "geteuid", lambda: 0)
    monkeypatch.setattr(slow_link, "_PATH", "")
    assert why_not() == "There is no ip and no tc. On Debian: apt-get install iproute2."
