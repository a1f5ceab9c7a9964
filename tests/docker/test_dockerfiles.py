"""The Dockerfiles against the repository. Building them needs docker, which tests do not."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dynmoe_ds.cli.main import build_parser

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


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
    """Whether a path at the root of the repository reaches docker; of the patterns that match it, the last decides."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(source, pattern.removeprefix("!")):
            sent = pattern.startswith("!")
    return sent


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def of(path: Path, word: str) -> list[str]:
    return [each.rest for each in instructions(path) if each.word == word]


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


def test_every_line_is_an_instruction(path: Path) -> None:
    assert {each.word for each in instructions(path)} <= INSTRUCTIONS
    assert instructions(path)[0].word == "FROM"


def test_what_is_copied_exists_and_is_sent_to_docker(path: Path) -> None:
    sources, stages = copies(path)
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent(source), f"{source} is ignored by .dockerignore"
    named = {line.split(" AS ")[1] for line in of(path, "FROM") if " AS " in line}
    assert stages and set(stages) <= named


def test_everything_that_an_installation_needs_is_copied(path: Path) -> None:
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert set(copies(path)[0]) == folders | files


def test_nothing_else_is_sent_to_docker() -> None:
    sent = {entry.name for entry in ROOT.iterdir() if is_sent(entry.name)}
    assert sent == set(copies(FILES[0])[0])


def test_python_is_pinned_and_the_one_that_types_are_checked_for(path: Path) -> None:
    for line in of(path, "FROM"):
        image, _, tag = line.split()[0].partition(":")
        version = re.match(r"\d+\.\d+\.\d+", tag)
        assert image == "python" and version is not None, f"{line} does not pin a version"
        assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version[0])
        assert version[0].startswith(PROJECT["tool"]["mypy"]["python_version"] + ".")


def test_torch_is_pinned_as_in_the_project(path: Path) -> None:
    (wanted,) = (r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "torch")
    words = [word for line in of(path, "RUN") for word in shlex.split(line)]
    assert [Requirement(word) for word in words if re.match(r"torch\b", word)] == [wanted]
    assert "." in words, "the project itself is installed"


def test_the_image_runs_the_console_script_as_an_ordinary_user(path: Path) -> None:
    (entry,), (command,) = of(path, "ENTRYPOINT"), of(path, "CMD")
    assert json.loads(entry)[0] in PROJECT["project"]["scripts"]
    build_parser().parse_args(json.loads(command))
    (user,) = of(path, "USER")
    assert user not in ("root", "0")
    words = [each.word for each in instructions(path)]
    assert "RUN" not in words[words.index("USER") :], "what runs after USER belongs before it"


def test_the_commands_in_the_header_are_the_image_s(path: Path) -> None:
    header = path.read_text().partition("FROM ")[0]
    assert f"docker build -f docker/{path.name} " in header
    for arguments in re.findall(r"dynmoe:\w+ ([^#\n]+?)\s*$", header, flags=re.MULTILINE):
        if arguments != ".":
            build_parser().parse_args(shlex.split(arguments))
