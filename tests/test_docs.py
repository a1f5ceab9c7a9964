"""Links of the pages lead somewhere, and the commands on them are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dynmoe_ds.cli.main import build_parser
from dynmoe_ds.config.groups import config_groups, launch_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """The `dynmoe` commands in a page's blocks of shell, lines that go on put together."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(" && ")]
    return [part.strip() for part in parts if part.strip().startswith("dynmoe ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [
        target for target in targets if not target.startswith("http") and not (page.parent / target).resolve().exists()
    ]
    assert not missing


def test_commands_can_be_read_and_their_options_exist() -> None:
    found = {command: page for page in PAGES for command in commands(page)}
    assert len(found) > 40
    groups = {**config_groups(), "launch": launch_names()}
    for command, page in found.items():
        words = shlex.split(command, comments=True)
        try:
            build_parser().parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {command}")
        for word in words:
            group, _, option = word.partition("=")
            is_choice = "=" in word and group in groups and "," not in option and not option.endswith(".yaml")
            if is_choice:
                assert option in groups[group], f"{page.name}: {word} of {command}"
