"""docs/configuration.md is what the schema and the files say."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from dynmoe_ds.cli.config_page import config_page
from dynmoe_ds.cli.plan import PLAN_KEYS
from dynmoe_ds.config.groups import CONFIG_MODULE, cluster_names, config_groups, launch_names
from dynmoe_ds.config.load import load_config, to_plain
from dynmoe_ds.launching.load import load_launch
from dynmoe_ds.planning.load_cluster import load_cluster

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def rows() -> dict[str, list[list[str]]]:
    """The cells after the key, by key; a key may be of several kinds of a section."""
    found: dict[str, list[list[str]]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            key, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(key.strip("`"), []).append(cells)
    return found


def test_the_page_is_current() -> None:
    if PAGE.read_text() != config_page():
        pytest.fail("docs/configuration.md is not current: python -m dynmoe_ds.cli.config_page > docs/configuration.md")


def leaves(plain: object, path: str = "") -> list[str]:
    if isinstance(plain, dict):
        return [leaf for key, value in plain.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]
    return [path]


@pytest.mark.parametrize("overrides", [["run_dir=x"], ["run_dir=x", "router=top_p_budget", "adaptation=none"]])
def test_every_key_of_a_run_is_on_it(overrides: list[str]) -> None:
    named = [
        leaf
        for leaf in leaves(to_plain(load_config(overrides)))
        if not re.fullmatch(r"(model|data|router)\.name", leaf)
    ]
    assert len(named) > 40 and set(named) <= rows().keys() | {"adaptation", "stage"}, set(named) - rows().keys()


def tables() -> dict[str, set[str]]:
    """The keys of each table by its heading, such as "optim" or "launch: `slurm`"."""
    found: dict[str, set[str]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            found.setdefault(heading, set()).add(line.split("`")[1])
    return found


def in_file(group: str, option: str) -> tuple[set[str], str | None]:
    """The keys that a file and those that it begins with set, written with their sections; the kind of its section."""
    text = (files(CONFIG_MODULE) / group / f"{option}.yaml").read_text(encoding="utf-8")
    plain = yaml.safe_load(text) or {}
    parents, kind = plain.pop("defaults", []), plain.pop("name", None)
    if text.startswith("# @package _global_"):
        return set(leaves(plain)), None
    named = set(leaves(plain, group)) if plain else set()
    for parent in parents:
        if parent != "_self_":
            inherited, its_kind = in_file(group, parent)
            named, kind = named | inherited, kind or its_kind
    return named, kind


@pytest.mark.parametrize("group", config_groups())
def test_every_key_of_a_file_is_in_the_table_of_its_kind(group: str) -> None:
    for option in config_groups()[group]:
        named, kind = in_file(group, option)
        assert named or option == "none", option
        if any(not key.startswith(f"{group}.") for key in named):  # of any section; null switches one off
            assert named <= rows().keys() | {"adaptation"}, (option, named - rows().keys())
        elif named:
            (keys,) = [keys for heading, keys in tables().items() if is_of(heading, group, kind)]
            assert named <= keys, (option, named - keys)


@pytest.mark.parametrize("option", launch_names())
def test_every_key_of_a_launch_is_in_the_table_of_its_kind(option: str) -> None:
    launch, _ = load_launch(option, [])
    named = set(leaves(to_plain(launch), "launch")) - {"launch.name"}
    in_its_file, kind = in_file("launch", option)
    (keys,) = [keys for heading, keys in tables().items() if is_of(heading, "launch", kind)]
    assert "launch.environment" in named and named | in_its_file <= keys, (named | in_its_file) - keys


def is_of(heading: str, group: str, kind: str | None) -> bool:
    """Whether it is that of the table of a kind of the section, or of the section that has no kinds."""
    return heading == group if kind is None else heading.startswith(f"{group}: ") and f"`{kind}`" in heading


def test_every_key_of_a_plan_is_on_it() -> None:
    named = leaves({"cluster": to_plain(load_cluster("h100_nodes", [])), "plan": dict.fromkeys(PLAN_KEYS)})
    assert "cluster.within_node.latency_s" in named and set(named) <= rows().keys(), set(named) - rows().keys()
    assert rows()["cluster.num_nodes"] == [["a whole number", "", "all: `1`"]]


def test_every_option_is_on_it() -> None:
    text, groups = PAGE.read_text(), {**config_groups(), "launch": launch_names(), "cluster": cluster_names()}
    options = [f"{group}={name}" for group, names in groups.items() for name in names]
    assert len(options) > 50 and not [option for option in options if f"- `{option}`: " not in text]


def test_a_row_has_type_default_and_what_the_files_set() -> None:
    found = rows()
    (tie,) = found["model.tie_embeddings"]
    assert tie == ["true or false", "`true`", "**llama_tiny**: `true`; llama_top_p: `false`"]
    (shared,) = found["model.shared_ffn_hidden_size"]
    assert shared[2] == "**llama_tiny**: `0`; llama_tiny_shared: `256`", "what begins with another file"
    (zero,) = found["parallel.zero_stage"]
    assert zero[0] == "a whole number" and zero[1] == "" and "**local**: " in zero[2]
