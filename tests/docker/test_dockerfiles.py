"""The Dockerfiles against the repository, and a linter. tests/docker/test_images.py builds them."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dynmoe_ds.cli.main import build_parser
from tests.docker.loaded import gpu_base

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"}
CONSTRAINTS = "docker/constraints.txt"


class Instruction(NamedTuple):
    word: str
    rest: str


def instructions(path: Path) -> list[Instruction]:
    """The file's instructions, with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n", " ", text)
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def copies(path: Path) -> tuple[list[str], list[str]]:
    """What COPY takes from the repository, and the stages that it takes something from."""
    sources, stages = [], []
    for _, rest in (each for each in instructions(path) if each.word == "COPY"):
        *words, _ = shlex.split(rest)
        stages += [word.removeprefix("--from=") for word in words if word.startswith("--from=")]
        sources += [] if words[0].startswith("--") else words
    return sources, stages


def is_sent(source: str) -> bool:
    """Whether a path reaches docker: of the patterns that match it, or a folder it is in, the last decides."""
    sent = True
    paths = [source, *(f"{one}" for one in Path(source).parents if one.name)]
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        # As docker has it, and unlike fnmatch, a star ends at a slash.
        matching = (path for path in paths if path.count("/") == pattern.count("/"))
        if pattern and not pattern.startswith("#") and any(fnmatch.fnmatch(p, pattern.lstrip("!")) for p in matching):
            sent = pattern.startswith("!")
    return sent


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def of(path: Path, word: str) -> list[str]:
    return [each.rest for each in instructions(path) if each.word == word]


def run_words(path: Path) -> list[str]:
    return [word for line in of(path, "RUN") for word in shlex.split(line)]


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    assert program is not None, "hadolint is missing: pip install -e '.[dev]'"
    return subprocess.run([program, "--no-color", f"{path}"], capture_output=True, text=True, check=False, timeout=60)


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


@pytest.mark.parametrize("path", [*FILES, ROOT / "tests/docker/nvidia_stand_in.Dockerfile"], ids=lambda path: path.name)
def test_the_linter_has_nothing_to_say(path: Path) -> None:
    done = lint(path)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_the_linter_finds_what_is_not_pinned(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install --no-cache-dir torch\n")
    done = lint(tmp_path / "Dockerfile")
    assert done.returncode == 1 and "DL3006" in done.stdout and "DL3013" in done.stdout


def test_every_line_is_an_instruction(path: Path) -> None:
    assert {each.word for each in instructions(path)} <= INSTRUCTIONS


def test_what_is_copied_exists_and_is_sent_to_docker(path: Path) -> None:
    sources, stages = copies(path)
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), f"{source} is ignored by .dockerignore"
    named = {line.split(" AS ")[1] for line in of(path, "FROM") if " AS " in line}
    assert set(stages) <= named


def test_everything_that_an_installation_needs_is_copied(path: Path) -> None:
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    of_images = {one for one in copies(path)[0] if one.startswith("docker/")}
    assert set(copies(path)[0]) == folders | files | of_images
    assert CONSTRAINTS in of_images


def test_nothing_else_is_sent_to_docker() -> None:
    # Compiled files of Python are no sources, and are not sent from any folder.
    there = [f"{one.relative_to(ROOT)}" for folder in (ROOT, ROOT / "docker") for one in folder.iterdir()]
    sent = {one for one in there if is_sent(one) and not one.endswith("__pycache__")}
    assert sent - {"docker"} == {source for path in FILES for source in copies(path)[0]}
    assert "**/__pycache__" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_cpu_image_pins_the_python_that_types_are_checked_for() -> None:
    for line in of(ROOT / "docker/cpu.Dockerfile", "FROM"):
        image, _, tag = line.split()[0].partition(":")
        version = re.match(r"\d+\.\d+\.\d+", tag)
        assert image == "docker.io/library/python" and version is not None, f"{line} does not pin a version"
        assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version[0])
        assert version[0].startswith(PROJECT["tool"]["mypy"]["python_version"] + ".")


def test_the_gpu_image_pins_nvidias_by_release_and_digest() -> None:
    path = ROOT / "docker/gpu.Dockerfile"
    assert of(path, "FROM") == ["${BASE}"]
    (base,) = (line.removeprefix("BASE=") for line in of(path, "ARG") if line.startswith("BASE="))
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", base)
    # What that release has: pip must find it good enough, or it would replace it.
    wanted = torch_requirement()
    assert wanted.specifier.contains("2.13.0a0+8145d630e8.nv26.6", prereleases=True), f"{base} has no {wanted}"


def torch_requirement() -> Requirement:
    (wanted,) = (r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "torch")
    return wanted


def test_torch_is_pinned_as_in_the_project_or_the_bases() -> None:
    cpu, gpu = (run_words(path) for path in FILES)
    assert [Requirement(word) for word in cpu if re.match(r"torch\b", word)] == [torch_requirement()]
    assert not [word for word in gpu if re.match(r"torch\b", word)]
    assert "." in cpu and "." in gpu, "the project itself is installed"


def test_pip_installs_pinned_packages_only(path: Path) -> None:
    installs = re.findall(r"pip (?:--python \S+ )?install (\S+)", "\n".join(of(path, "RUN")))
    assert installs and set(installs) == {"--constraint"}


def test_every_dependency_is_pinned_at_a_version_that_the_project_takes() -> None:
    pinned = gpu_base.read(ROOT / CONSTRAINTS)
    for wanted in map(Requirement, PROJECT["project"]["dependencies"]):
        version = pinned[gpu_base.canonical(wanted.name)]
        assert wanted.specifier.contains(version), f"{wanted.name} is pinned at {version}"


def test_the_image_runs_the_console_script_as_an_ordinary_user(path: Path) -> None:
    (entry,), (command,) = of(path, "ENTRYPOINT"), of(path, "CMD")
    assert json.loads(entry)[-1] in PROJECT["project"]["scripts"]
    build_parser().parse_args(json.loads(command))
    # By number: a cluster that refuses root cannot tell from a name.
    assert of(path, "USER") == ["$USER_ID"] and "USER_ID=1000" in of(path, "ARG")
    words = [each.word for each in instructions(path)]
    assert "RUN" not in words[words.index("USER") :], "what runs after USER belongs before it"


def test_the_doctor_is_the_health_check(path: Path) -> None:
    (line,) = of(path, "HEALTHCHECK")
    options, _, command = line.partition(" CMD ")
    assert json.loads(command) == ["dynmoe", "doctor"]
    assert set(re.findall(r"--(\w+)=", options)) == {"interval", "timeout"}


def test_the_commands_in_the_header_are_the_image_s(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None and f"docker build -f docker/{path.name} " in header[0]
    for arguments in re.findall(r"dynmoe:\w+ ([^#\n]+?)\s*$", header[0], flags=re.MULTILINE):
        if arguments != ".":
            build_parser().parse_args(shlex.split(arguments))
