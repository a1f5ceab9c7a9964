"""What is in a checkpoint, and in what two differ, as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import TinyModel, deepspeed_config, train
from tests.helpers.spawn import run_ranks

import dynmoe_ds as dm
from dynmoe_ds.adaptation import Grow, Plan, Prune
from dynmoe_ds.cli.main import main


def write(rank: int, world_size: int, folder: str) -> dict[str, dict[int, int]]:
    """Step 2 in `a` and, on another layout, in `b`; in `c` one expert more has come and one has gone."""
    engine = dm.initialize(TinyModel(2, num_experts=3), deepspeed_config(2), dm.AdaptationConfig(50, 5))
    train(engine, range(2), rank, world_size)
    engine.save_checkpoint(f"{folder}/a")
    loads = engine.last_loads()
    other = dm.initialize(TinyModel(1, num_experts=3, num_slots=6), deepspeed_config(3))
    other.load_checkpoint(f"{folder}/a")
    other.save_checkpoint(f"{folder}/b")
    row = torch.nn.functional.normalize(torch.ones(16), dim=0)
    grow = Grow(layer="moe.0", expert_id=3, slot=1, gate_row=row, seeding="fresh", parent_id=None)
    engine.apply_plan(Plan(items=(grow, Prune(layer="moe.1", expert_id=0))))
    engine.save_checkpoint(f"{folder}/c")
    return loads


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(write, 2, f"{folder}")[0]


def test_inspect_in_json(written: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, loads = written
    assert main(["inspect", f"{folder / 'c'}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["optimizer"]) == (2, "AdamW")
    assert found["layout"] == {"world_size": 2, "zero_stage": 2, "dtype": "float32"}
    assert (
        found["bytes"]
        == sum(path.stat().st_size for path in (folder / "c" / "step-00000002").rglob("*") if path.is_file())
        - (folder / "c" / "step-00000002" / "manifest.json").stat().st_size
    )
    first, second = (found["layers"][name] for name in ("moe.0", "moe.1"))
    assert first["experts"]["3"] == {"born": 2, "died": None, "last_load": None}
    assert second["experts"]["0"] == {"born": 0, "died": 2, "last_load": loads["moe.1"][0]}
    assert first["experts"]["1"] == {"born": 0, "died": None, "last_load": loads["moe.0"][1]}
    assert sum(loads["moe.0"].values()) > 0 and first["num_slots"] == 8 and first["slots"][1] == 3


def test_inspect_in_words(written: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, loads = written
    assert main(["inspect", f"{folder / 'c' / 'step-00000002'}"]) == 0
    text = capsys.readouterr().out
    assert "step 2" in text and "written by 2 ranks at ZeRO-2 in float32" in text
    assert "moe.0: 4 experts in 8 slots over 2 ranks, TopAnyConfig" in text
    assert "moe.1: 2 experts in 8 slots" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["3", "1", "2", "–", "–"] in lines and ["0", "–", "0", "2", f"{loads['moe.1'][0]}"] in lines


def test_layouts_do_not_make_a_difference(written: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = written
    assert main(["diff", f"{folder / 'a'}", f"{folder / 'b'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal"


def test_differences_are_named(written: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = written
    assert main(["diff", f"{folder / 'a'}", f"{folder / 'c'}"]) == 1
    text = capsys.readouterr().out
    assert "  moe.0.experts.3.w1/exp_avg: only in the second" in text
    assert "  moe.1.experts.0.w2/weight: only in the first" in text
    assert "moe.0.experts.1." not in text and "first.weight" not in text


def test_changed_values_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(write_two_steps, 1, f"{tmp_path}")
    assert main(["diff", f"{tmp_path / 'one'}", f"{tmp_path / 'two'}"]) == 1
    text = capsys.readouterr().out
    assert "first.weight/weight: 256 of 256 elements, by up to 0.0" in text
    assert "entries differ." in text


def write_two_steps(rank: int, world_size: int, folder: str) -> None:
    engine = dm.initialize(TinyModel(1), deepspeed_config(0))
    for step, name in enumerate(("one", "two")):
        train(engine, range(step, step + 1), rank, world_size)
        engine.save_checkpoint(f"{folder}/{name}")


def test_a_damaged_checkpoint_is_refused(
    written: tuple[Path, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["inspect", f"{tmp_path}"]) == 2
    assert "has no checkpoint" in capsys.readouterr().err
    folder, _ = written
    file = folder / "b" / "step-00000002" / "shared.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert main(["diff", f"{folder / 'a'}", f"{folder / 'b'}"]) == 2
    assert "shared.pt has" in capsys.readouterr().err
    file.write_bytes(content)
