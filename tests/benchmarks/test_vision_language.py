"""The comparison on the vision-language demo: its settings and its page. The runs themselves take minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import vision_language
from benchmarks.vision_language import BEFORE, VARIANTS, cell_folder, page_lines, result, third_stage
from dynmoe_ds.config.load import load_config
from dynmoe_ds.telemetry.history import read_history
from tests.telemetry.fake_run import write_fake_run

SHARES = {"": 0.5, "which": 0.75, "sum": 0.25}


def cell(variant: str, seed: int, share: float, **values: Any) -> dict[str, Any]:
    told = {
        "exact_match": {"all": share, "sum": share / 2}, "loss": 1.0, "mean_k": None, "live": [], "births": 0,
        "deaths": 0, "active_parameters": None, "forward_flops_per_token": None, "mean_k_per_kind": {},
    }  # fmt: skip
    return {"variant": variant, "seed": seed, **told, **values}


def test_variants_differ_in_the_experts_alone(tmp_path: Path) -> None:
    model = tmp_path / "2_demo_language" / "model"
    model.mkdir(parents=True)
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "tokenizer").mkdir()
    for name in ("train.json", "held_out.json"):
        (data / name).write_text("[]")
    configs = {name: load_config(third_stage(name, 3, tmp_path, data)) for name in VARIANTS}
    dynamic = configs["dynamic"]
    assert dynamic.adaptation is not None and dynamic.seed == 3
    for name, config in configs.items():
        assert (config.optim, config.training, config.data) == (dynamic.optim, dynamic.training, dynamic.data), name
        assert (config.adaptation is None) == (name != "dynamic"), name
        assert config.stage is not None and config.stage.start == str(model)
        assert config.stage.has_experts == (name != "dense, the whole decoder")
    assert len({cell_folder(tmp_path, name, seed) for name in VARIANTS for seed in (0, 1)}) == 2 * len(VARIANTS)


def test_a_cell_is_what_its_run_ended_with(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", steps=120, exact_match=SHARES)
    found = json.loads(json.dumps(result(read_history(run))))
    assert found["steps"] == 120 and found["exact_match"] == {"all": 0.5, "sum": 0.25, "which": 0.75}
    assert len(found["live"]) == 2 and all(live >= 2 for live in found["live"])
    assert found["births"] > 0
    assert found["mean_k"] is None  # the made-up run logs none of its held-out data


def test_the_page_has_means_and_ranges(tmp_path: Path) -> None:
    results = [
        cell(BEFORE, 0, 0.4),
        *(
            cell(
                "dynamic", seed, share, mean_k=2.0, live=[8.0, 7.0 + seed], births=8, mean_k_per_kind={"text sum": 1.5}
            )
            for seed, share in enumerate((0.6, 0.7))
        ),
    ]
    lines = list(page_lines(results))
    assert f"| {BEFORE} | 1 | 40.0 | 20.0 | 1.000 |" in lines
    assert "| dynamic | 2 | 65.0 ± 5.0 | 32.5 ± 2.5 | 1.000 ± 0.000 |" in lines
    assert f"| {BEFORE} | – | – | 0.0 / 0.0 | – | – |" in lines
    assert "| dynamic | 2.00 ± 0.00 | 8.0 ± 0.0, 7.5 ± 0.5 | 8.0 ± 0.0 / 0.0 ± 0.0 | – | – |" in lines
    assert "| text sum | 1.50 ± 0.00 |" in lines
    picture = vision_language.draw(results, tmp_path / "bars.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
