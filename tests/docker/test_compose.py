"""The compose file against the compose specification, torchrun's parser and our own configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynmoe_ds.cli.main import build_parser
from dynmoe_ds.config.load import load_config
from dynmoe_ds.launching import hosts
from tests.docker.test_dockerfiles import of
from tests.launching.helpers import hostfile, launch_of, runs_of

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker/compose.yaml"
HOSTS = ("host-a", "host-b")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())["services"]


def torchruns(words: list[str]) -> Any:
    from torch.distributed.run import parse_args

    return parse_args(words)


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", f"{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_it_is_a_compose_file(tmp_path: Path) -> None:
    done = validate(FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "compose.yaml").write_text(FILE.read_text().replace("hostname:", "host_name:"))
    assert validate(tmp_path / "compose.yaml").returncode == 1


def test_two_hosts_share_image_network_and_run_folder(services: dict[str, Any]) -> None:
    assert tuple(services) == HOSTS == tuple(one["hostname"] for one in services.values())
    for key in ("image", "entrypoint", "volumes", "networks", "environment"):
        assert services["host-a"][key] == services["host-b"][key], key
    header = (ROOT / "docker/cpu.Dockerfile").read_text()
    assert f"-t {services['host-a']['image']} ." in header
    volume, _, there = services["host-a"]["volumes"][0].partition(":")
    assert volume in yaml.safe_load(FILE.read_text())["volumes"]
    (home,) = {line for line in of(ROOT / "docker/cpu.Dockerfile", "WORKDIR") if line.startswith("/home")}
    assert there == f"{home}/runs"


def test_the_run_is_one_that_dynmoe_takes_with_its_experts_on_both_hosts(services: dict[str, Any]) -> None:
    for number, one in enumerate(services.values()):
        assert one["entrypoint"] == ["python", "-m", "torch.distributed.run"]
        parsed = torchruns(one["command"])
        assert (parsed.node_rank, parsed.master_addr) == (number, "host-a")
        assert parsed.module and parsed.training_script == "dynmoe_ds"
        arguments = build_parser().parse_args(parsed.training_script_args)
        config = load_config(arguments.overrides)
        ranks_per_host = int(parsed.nproc_per_node)
        assert config.parallel.num_ranks == int(parsed.nnodes) * ranks_per_host == len(services) * ranks_per_host
        assert config.parallel.ep_size > ranks_per_host, "experts are shared across hosts"
        assert config.run_dir.startswith("runs/"), "the volume's"


def test_the_hosts_are_started_as_by_launch(services: dict[str, Any], tmp_path: Path) -> None:
    pair = hostfile(tmp_path, "".join(f"{name} slots=1\n" for name in HOSTS))
    launch = launch_of("hosts_torchrun", hostfile=pair, start="print")
    for one, command in zip(services.values(), hosts.commands(launch, runs_of(run_dir="/runs")), strict=True):
        words = command.words[-1].split()
        theirs, ours = torchruns(words[words.index("torch.distributed.run") + 1 :]), torchruns(one["command"])
        assert {**vars(ours), "training_script_args": None} == {**vars(theirs), "training_script_args": None}
        assert {f"{name}={value}" for name, value in one["environment"].items()} <= set(words)
