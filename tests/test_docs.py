"""Links of the pages lead somewhere, the commands on them are commands, and quoted messages are what is said."""

from __future__ import annotations

import ast
import mmap
import re
import shlex
import subprocess
from importlib.util import find_spec
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


# The messages in the tables of troubleshooting, each with its words where it is made; {} is a value.
OWN_MESSAGES = {
    "A MoELayer with ep_size 2 was given to deepspeed.initialize": (
        "moe/layer.py", "A MoELayer with ep_size {} was given to deepspeed.initialize"
    ),
    "ep_size is 3 but must divide ...": ("distributed/layout.py", "ep_size is {} but must divide"),
    "num_slots is 10 but must be a multiple of ...": ("moe/layer.py", "num_slots is {} but must be a multiple of"),
    "There is no key 'optim.lrr'": ("config/build.py", "There is no key {}"),
    "run_dir ... exists and is not empty": ("config/validate.py", "run_dir {} exists and is not empty"),
    "run_dir ... is in use by ...": ("telemetry/run_owner.py", "run_dir {} is in use by"),
    "run_dir ... cannot be made": ("config/validate.py", "run_dir {} cannot be made"),
    "cannot be used": ("telemetry/run_owner.py", "run_dir {} cannot be used"),
    "parallel.num_ranks is 2 but there is 1 GPU here": (
        "cli/launcher.py", "parallel.num_ranks is {} but there {} here"
    ),
    "A MoELayer was built under deepspeed.zero.Init": (
        "moe/layer.py", "A MoELayer was built under deepspeed.zero.Init"
    ),
    "out of slots": ("telemetry/events.py", "is out of slots"),
    "Another rank did not take part ...": ("distributed/lost_rank.py", "Another rank did not take part"),
    "... is of another model": ("engine/snapshot.py", "{} is of another model"),
    "was cut off": ("checkpoint/store.py", "it was cut off"),
    "its checksum differs": ("checkpoint/store.py", "its checksum differs"),
    "sbatch refused ...": ("launching/slurm.py", "sbatch refused"),
    "Waiting for up to 60 s for a sign of life": (
        "telemetry/run_owner.py", "Waiting for up to {} s for a sign of life"
    ),
    "... is of ... now": ("telemetry/run_owner.py", "{} is of {} now"),
    "parallel.num_ranks is 16 but the launcher started 8": (
        "cli/train.py", "parallel.num_ranks is {} but the launcher started {}"
    ),
}  # fmt: skip
# Those of others, in whose files their words are.
OTHER_MESSAGES = {
    "None of the param groups are marked as MoE": (
        "deepspeed/runtime/zero/stage_1_and_2.py", ["None of the param groups are marked as MoE"]
    ),
    "Timed out waiting 20000ms for recv operation": (
        "torch/lib/libtorch_cpu.so", ["Timed out waiting ", "ms for recv operation"]
    ),
    "Watchdog caught collective operation timeout": (
        "torch/lib/libtorch_cuda.so", ["Watchdog caught collective operation timeout"]
    ),
    "Gloo connectFullMesh failed": ("torch/lib/libtorch_cpu.so", ["Gloo connectFullMesh failed"]),
}  # fmt: skip


def texts_in(path: Path) -> list[str]:
    """The strings of a module, those that stand side by side joined, with {} for what is put in."""

    def text_of(node: ast.JoinedStr) -> str:
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)

    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append(text_of(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub("%[sdg]", "{}", node.value))
    return found


def test_every_message_in_a_table_of_troubleshooting_is_looked_for() -> None:
    quoted = {"out of slots"}  # the only one in another column
    for name in ("troubleshooting", "clusters"):
        _, _, text = (ROOT / "docs" / f"{name}.md").read_text().partition("# Troubleshooting\n")
        for line in text.splitlines():
            if line.startswith("| "):
                quoted |= {quote for quote in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if " " in quote}
    assert quoted == OWN_MESSAGES.keys() | OTHER_MESSAGES.keys()


@pytest.mark.parametrize("quote", OWN_MESSAGES)
def test_a_message_of_ours_is_quoted_as_it_is(quote: str) -> None:
    file, words = OWN_MESSAGES[quote]
    assert [text for text in texts_in(ROOT / "dynmoe_ds" / file) if words in text], (file, words)
    pattern = re.escape(words).replace(re.escape("{}"), ".+")
    assert quote in words or re.fullmatch(pattern, quote.removesuffix(" ...")), (quote, words)


@pytest.mark.parametrize("quote", OTHER_MESSAGES)
def test_a_message_of_others_is_quoted_as_it_is(quote: str) -> None:
    name, words = OTHER_MESSAGES[quote]
    path = Path(str(find_spec(name.partition("/")[0]).origin)).parents[1] / name  # type: ignore[union-attr]
    if not path.exists() and path.name == "libtorch_cuda.so":
        pytest.skip("this torch is without CUDA, and so without NCCL's messages")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert all(content.find(part.encode()) >= 0 for part in words)
    assert re.fullmatch(".+".join(map(re.escape, words)), quote)


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
