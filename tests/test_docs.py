"""Links of the pages lead somewhere, and the commands on them are commands."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dynmoe_ds.cli.main import build_parser
from dynmoe_ds.config.groups import config_groups, launch_names
from dynmoe_ds.config.load import load_config
from tests.helpers.vision_language import empty_files

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


def test_the_demo_of_vision_and_language_has_its_peers_at_equal_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = subprocess.run(["make", "-n", "demo-vl"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said = [shlex.split(line)[1:] for line in told.replace("\\\n", " ").splitlines() if "bin/dynmoe " in line]
    assert [words[0] for words in said] == ["stages", "train", "train", "evaluate", "report", "report"]
    for words in said:
        build_parser().parse_args(words)
    assert {"stages=demo_projector,demo_language,demo_experts", "run_dir=runs/demo_vl"} < set(said[0])
    assert said[-1] == ["report", "runs/demo_vl"], "with the stages and the peers in it"
    start = "runs/demo_vl/2_demo_language/model"
    for folder in (start, "data/digits"):
        (tmp_path / folder).mkdir(parents=True)
    empty_files(tmp_path / "data/digits")
    monkeypatch.chdir(tmp_path)
    dynamic = load_config(["experiment=demo_vl", "stage=demo_experts", "run_dir=x"])
    top_2, dense = (load_config(words[1:]) for words in said[1:3])
    for peer in (top_2, dense):
        for section in ("training", "optim", "data", "seed"):
            assert getattr(peer, section) == getattr(dynamic, section), section
        assert Path(peer.run_dir).parent == Path("runs/demo_vl")
        assert peer.adaptation is None and peer.stage.start == start and peer.stage.trained == dynamic.stage.trained
    assert (top_2.router.k, top_2.model.num_experts, top_2.model.moe_layers) == (2, 4, dynamic.model.moe_layers)
    assert (dense.router.k, dense.model.num_experts, dense.model.moe_layers) == (1, 1, dynamic.model.moe_layers)
