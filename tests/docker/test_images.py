"""The images, built and run: `dynmoe doctor`, a training as an ordinary user, the rehearsal of two hosts.

`make test-docker` runs these: as root, with podman. What is not there is skipped with one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from tests.docker.loaded import gpu_base
from tests.docker.podman import ROOT, STAND_IN_BASE, Podman, why_not
from tests.helpers.run_lines import last_step, what_was_written

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

CPU, GPU = "localhost/dynmoe:cpu", "localhost/dynmoe:gpu"
MOST_GB = 2.0
PROJECT = "rehearsal-of-tests"
_VERSIONS = (
    "import importlib.metadata as m; "
    "print(*(f'{one.name}=={one.version}' for one in m.distributions() if one.name), sep='\\n')"
)


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    if reason := why_not():
        pytest.skip(reason)
    one = Podman()
    try:
        print(f"The base is of the {one.have_base()}.")
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def cpu(podman: Podman) -> str:
    podman.build(ROOT / "docker/cpu.Dockerfile", CPU)
    return CPU


def installed(podman: Podman, image: str, python: str) -> dict[str, str]:
    """The packages of an image, by name."""
    told = podman("run", "--rm", "--entrypoint", python, image, "-c", _VERSIONS).split()
    return {gpu_base.canonical(name): version for name, _, version in (line.partition("==") for line in told)}


def test_the_cpu_image_is_small_and_has_the_packages_it_is_said_to_have(podman: Podman, cpu: str) -> None:
    size_gb = int(podman("image", "inspect", "--format", "{{.Size}}", cpu)) / 1e9
    print(f"The image takes {size_gb:.2f} GB.")
    assert size_gb < MOST_GB
    found = installed(podman, cpu, "/opt/dynmoe/bin/python")
    pinned = gpu_base.read(ROOT / "docker/constraints.txt")
    assert {name: version.partition("+")[0] for name, version in found.items() if name != "dynmoe-ds"} == pinned
    assert found["torch"].endswith("+cpu")


def test_the_doctor_finds_everything_and_is_the_health_check(podman: Podman, cpu: str) -> None:
    assert "Everything a run needs is here." in podman("run", "--rm", cpu)
    assert podman("run", "--rm", "--entrypoint", "id", cpu).startswith("uid=1000(dynmoe)")
    podman("run", "--detach", "--name", "well", "--entrypoint", "sleep", cpu, "600")
    assert podman.try_("healthcheck", "run", "well").returncode == 0
    assert podman("inspect", "--format", "{{.State.Health.Status}}", "well").strip() == "healthy"
    podman("run", "--detach", "--name", "ill", "--env", "DS_ACCELERATOR=none-such", "--entrypoint", "sleep", cpu, "600")
    assert podman.try_("healthcheck", "run", "ill").returncode != 0


def test_the_demo_trains_as_an_ordinary_user(podman: Podman, cpu: str) -> None:
    short = [f"training.{one}" for one in ("steps=20", "eval_every_steps=10", "eval_sequences=8", "sample_tokens=10")]
    short += ["optim.warmup_steps=5", "adaptation.every_steps=10", "adaptation.window_steps=5"]
    volume = ("--volume", "demo:/home/dynmoe/runs")
    train = ("train", "experiment=demo", "run_dir=runs/demo", *short)
    said = podman("run", "--rm", *volume, cpu, *train, timeout_s=900)
    run = podman.volume("demo") / "demo"
    assert (run / "finished.json").exists(), said[-4000:]
    assert last_step(run) == 20
    podman("run", "--rm", *volume, cpu, "report", "runs/demo")
    assert list(run.glob("*.html"))
    # Not of what links lead to: wandb has some to folders of the container.
    assert {path.lstat().st_uid for path in run.rglob("*")} == {1000}


def test_two_hosts_of_the_compose_file_train_as_one(podman: Podman, cpu: str) -> None:
    command = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["host-a"]["command"]
    overrides = [word for word in command[command.index("train") + 1 :] if not word.startswith("run_dir=")]
    volume = ("--volume", "one:/home/dynmoe/runs")
    podman("run", "--rm", *volume, cpu, "train", *overrides, "run_dir=runs/one", timeout_s=900)
    up = podman.compose("--project-name", PROJECT, "up")
    assert up.returncode == 0, (up.stdout[-4000:], up.stderr[-4000:])
    label = f"label=io.podman.compose.project={PROJECT}"
    assert podman("ps", "--all", "--filter", label, "--format", "{{.ExitCode}}").split() == ["0", "0"], up.stdout[
        -4000:
    ]
    both, one = podman.volume(f"{PROJECT}_runs") / "rehearsal", podman.volume("one") / "one"
    assert (both / "finished.json").exists()
    assert what_was_written(both) == what_was_written(one)
    assert podman.compose("--project-name", PROJECT, "down", "--volumes").returncode == 0


def test_the_gpu_image_keeps_what_its_base_brings(podman: Podman) -> None:
    podman.have_base()
    podman.build(ROOT / "tests/docker/nvidia_stand_in.Dockerfile", STAND_IN_BASE)
    said = podman.build(ROOT / "docker/gpu.Dockerfile", GPU, "--build-arg", f"BASE={STAND_IN_BASE}")
    assert "torch, apex and Transformer Engine are the base's." in said
    before, after = (installed(podman, image, "python3") for image in (STAND_IN_BASE, GPU))
    assert before["torch"] == after["torch"] == "2.13.0a0+8145d630e8.nv26.6"
    assert before["numpy"] == after["numpy"] == "1.26.4"
    assert before["click"] == "8.1.8" and after["click"] > "8.4", "transformers needs it newer"
    pinned = gpu_base.read(ROOT / "docker/constraints.txt")
    assert {name: after[name] for name in ("deepspeed", "transformers")} == {
        name: pinned[name] for name in ("deepspeed", "transformers")
    }
    assert podman("run", "--rm", "--entrypoint", "id", GPU).startswith("uid=1000(dynmoe)")
    assert "apex.optimizers.FusedAdam is available" in podman("run", "--rm", "--env", "DS_ACCELERATOR=cpu", GPU)
