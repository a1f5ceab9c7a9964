"""The pictures of evenness, kinds of tokens and cost: there where the run has the numbers, and of these numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.report import write_report
from dynmoe_ds.telemetry.routing_pictures import MAX_KINDS_SHOWN, draw_routing, kinds_of
from dynmoe_ds.telemetry.run_folder import RunFolder

LAYERS = ("layers.0.mlp", "layers.2.mlp")
NEW = ("load_entropy", "mean_k_per_kind", "mean_k_per_kind_by_layer", "active_parameters")


def values(step: int, kinds: tuple[str, ...] = ("easy", "hard"), group: str = "moe") -> dict[str, float]:
    """What a trainer logs of two layers and two kinds."""
    found = {f"{group}/active_parameters": 2e6 + 1e3 * step, f"{group}/forward_flops_per_token": 5e6}
    found |= {"moe/training_flops_per_token": 15e6} if group == "moe" else {}
    for place, layer in enumerate(LAYERS):
        found |= {f"moe/live_experts/{layer}": 4.0} if group == "moe" else {}
        found |= {f"{group}/mean_k/{layer}": 1.5 + place, f"{group}/load_entropy/{layer}": 0.9 - 0.1 * place}
        found |= {f"{group}/mean_k_per_kind/{kind}/{layer}": 1.0 + place + i for i, kind in enumerate(kinds)}
    return found | {f"{group}/mean_k_per_kind/{kind}": 1.5 + i for i, kind in enumerate(kinds)}


def run(path: Path, *lines: dict[str, float]) -> Path:
    folder = RunFolder(path)
    for step, line in enumerate(lines, start=1):
        folder.append_metrics(step, line, time_s=step)
    folder.close()
    return path


def pictures(path: Path) -> dict[str, tuple[bytes, str]]:
    history = read_history(path)
    names = {layer: layer for layer in LAYERS}
    drawn = draw_routing(history, history.layers, names, note="")
    return {picture.name: (picture.png, picture.caption) for picture in drawn}


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_every_picture_is_drawn_from_its_own_numbers(tmp_path: Path) -> None:
    first, last = values(1), values(2) | values(2, group="eval")
    drawn = pictures(run(tmp_path / "a", first, last))
    assert tuple(drawn) == NEW
    assert all("held-out data" in drawn[name][1] for name in ("mean_k_per_kind", "mean_k_per_kind_by_layer"))
    changes = {
        "load_entropy": f"moe/load_entropy/{LAYERS[1]}",
        "mean_k_per_kind": "eval/mean_k_per_kind/hard",
        "mean_k_per_kind_by_layer": f"eval/mean_k_per_kind/easy/{LAYERS[0]}",
        "active_parameters": "eval/active_parameters",
    }
    for changed, key in changes.items():
        other = pictures(run(tmp_path / changed, first, last | {key: last[key] / 2}))
        assert [name for name in NEW if other[name] != drawn[name]] == [changed]


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_pictures_without_evaluation_with_gaps_and_without_anything(tmp_path: Path) -> None:
    without_hard = {name: value for name, value in values(2).items() if "hard" not in name}
    drawn = pictures(run(tmp_path / "gap", values(1), without_hard, values(3)))
    assert tuple(drawn) == NEW and "training data at the last log line" in drawn["mean_k_per_kind_by_layer"][1]
    assert "Circles" not in drawn["mean_k_per_kind"][1]
    nan = dict.fromkeys(values(1), math.nan)
    assert tuple(pictures(run(tmp_path / "nan", nan, nan))) == NEW
    assert pictures(run(tmp_path / "none", {"train/loss": 1.0})) == {}


def test_kinds_are_found_once_and_only_so_many_are_drawn(tmp_path: Path) -> None:
    kinds = tuple(f"kind {number}" for number in range(MAX_KINDS_SHOWN + 2))
    path = run(tmp_path / "run", values(1, kinds) | values(1, kinds, group="eval"))
    assert kinds_of(read_history(path)) == list(kinds)
    assert f"The first {MAX_KINDS_SHOWN} of {len(kinds)} kinds are shown." in pictures(path)["mean_k_per_kind"][1]


def test_the_report_tells_cost_and_evenness(tmp_path: Path) -> None:
    text = write_report(run(tmp_path / "run", values(1), values(2))).read_text()
    assert "<dt>active parameters per token, last</dt><dd>2.0M</dd>" in text
    assert "<dt>training FLOPs per token, last</dt><dd>15.0M</dd>" in text
    assert all(f'alt="{title}"' in text for title in ("Evenness of load", "Experts per token by kind and layer"))
    assert "evenness of load (0 to 1), last" in text and "<td class=number>0.80</td>" in text
