"""What starts ranks on hosts, and what becomes of signals, codes and failures; tests/cluster/ has real hosts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from dynmoe_ds.launching import hosts
from tests.launching.helpers import hostfile, launch_of, runs_of


@pytest.fixture
def pair(tmp_path: Path) -> str:
    return hostfile(tmp_path)


def commands_of(kind: str, pair: str, **values: Any) -> tuple[hosts.Command, ...]:
    return hosts.commands(launch_of(kind, hostfile=pair, **values), runs_of(run_dir="/shared/run"))


@pytest.mark.parametrize("kind", ["hosts_pdsh", "hosts_openmpi"])
def test_deepspeeds_launcher_understands_the_command(kind: str, pair: str) -> None:
    from deepspeed.launcher.multinode_runner import OpenMPIRunner, PDSHRunner
    from deepspeed.launcher.runner import encode_world_info, parse_args

    values = {"ssh_options": ["-p", "2222"], "runner_options": ["--mca", "btl_tcp_if_include", "ib0"]}
    if kind == "hosts_pdsh":
        values["runner_options"] = ["-t", "10"]
    (command,) = commands_of(kind, pair, master_addr="10.0.0.1", **values)
    words = list(command.words)
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    parsed = parse_args(words[3:])
    assert (parsed.hostfile, parsed.launcher, parsed.force_multi) == (pair, kind.removeprefix("hosts_"), True)
    assert (parsed.master_addr, parsed.master_port, parsed.module, parsed.no_local_rank) == (
        "10.0.0.1",
        29500,
        True,
        True,
    )
    assert parsed.no_ssh_check, "which does not know our options"
    assert [parsed.user_script, *parsed.user_args] == [
        "dynmoe_ds", "train", "--config", "/shared/run/launch/config.yaml",
    ]  # fmt: skip
    slots = {"a": [0], "b": [0]}
    ssh = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=2 -p 2222"
    if kind == "hosts_pdsh":
        started = " ".join(PDSHRunner(parsed, encode_world_info(slots)).get_cmd({}, slots)[0])
        assert "pdsh -S -f 1024 -w a,b -t 10 " in started
        assert command.environment["PDSH_SSH_ARGS_APPEND"] == ssh
    else:
        started = OpenMPIRunner(parsed, encode_world_info(slots), {"a": 1, "b": 1}).get_cmd({}, slots)
        assert started[started.index("plm_rsh_args") + 1] == ssh
        assert "eth0" not in started and started[started.index("btl_tcp_if_include") + 1] == "ib0"


def test_deepspeeds_file_of_variables(pair: str) -> None:
    environment = ["NCCL_SOCKET_IFNAME=ib0", "OMP_NUM_THREADS=4"]
    texts = {
        kind: hosts.files(launch_of(kind, hostfile=pair, environment=environment), runs_of(run_dir="/shared/run"))
        for kind in ("hosts_pdsh", "hosts_openmpi", "hosts_torchrun")
    }
    lines = texts["hosts_pdsh"]["deepspeed_env"].splitlines()
    assert lines == [
        "DYNMOE_STOP_FILE=/shared/run/launch/stop", "DYNMOE_EXIT_NOTE=/shared/run/launch/exit_code",
        "OMP_NUM_THREADS=4", "TOKENIZERS_PARALLELISM=false", "NCCL_SOCKET_IFNAME=ib0",
    ]  # fmt: skip
    assert {"MASTER_ADDR=a", "MASTER_PORT=29500"} <= set(texts["hosts_openmpi"]["deepspeed_env"].splitlines())
    assert texts["hosts_torchrun"] == {}, "its commands carry them"


def test_torchrun_understands_what_each_host_runs(pair: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/my code")
    for number, command in enumerate(commands_of("hosts_torchrun", pair, start="print", environment=["A=b c"])):
        line = command.words[-1]
        assert line.startswith(f"cd {tmp_path} && env ")
        words = shlex.split(line)
        assert "PYTHONPATH=/my code" in words and "A=b c" in words
        parsed = parse_args(words[words.index("torch.distributed.run") + 1 :])
        assert (parsed.nnodes, parsed.node_rank, parsed.nproc_per_node) == ("2", number, "1")
        assert (parsed.master_addr, parsed.master_port, parsed.rdzv_backend) == ("a", 29500, "static")
        assert parsed.training_script_args == ["train", "--config", "/shared/run/launch/config.yaml"]


def test_ssh_runs_the_same_line(pair: str) -> None:
    printed, through = (commands_of("hosts_torchrun", pair, start=start) for start in ("print", "ssh"))
    for number, (one, other) in enumerate(zip(printed, through, strict=True)):
        assert other.words[:2] == ("ssh", "-tt") and other.words[-2] == "ab"[number]
        inner = shlex.split(other.words[-1])
        assert inner[:4] == ["bash", "-o", "pipefail", "-c"]
        assert inner[4] == f"stty -opost; {one.words[-1]} 2>&1 | cat"
    text = list(hosts.lines(launch_of("hosts_torchrun", hostfile=pair, start="print"), runs_of(run_dir="/shared/run")))
    assert text == ["# a", printed[0].words[-1], "# b", printed[1].words[-1]]
