"""docs/configuration.md is what the schema and the files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dynmoe_ds.cli.config_page import config_page
from dynmoe_ds.cli.plan import PLAN_KEYS
from dynmoe_ds.config.groups import cluster_names, config_groups, launch_names
from dynmoe_ds.config.load import load_config, to_plain
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
