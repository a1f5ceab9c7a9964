"""A run that TensorBoard shows as well: its curves are the run folder's lines, also when it was started again."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tests.helpers.run_config import small_run
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import CheckpointConfig, RunConfig
from dynmoe_ds.telemetry import read_metrics
from dynmoe_ds.telemetry.metrics import tier_of
from dynmoe_ds.training.trainer import Trainer

LAYER = "model.layers.1.mlp"
OF_THE_LAYER = {f"moe/{name}/{LAYER}" for name in ("mean_k", "slots", "unrouted_share", "load_entropy")}


class Broken(Exception):
    """What ends the first part of a run."""


def train_in_two_parts(rank: int, world_size: int, *runs: RunConfig) -> list[int]:
    """From which step each goes on after it broke in step 6, of which 5 were logged and 3 were saved."""
    first_steps = []
    for run in runs:
        broken = Trainer(run)
        ordinary = broken._train_step

        def train_step(at: int, ordinary: Any = ordinary) -> None:
            if at == 5:
                raise Broken
            ordinary(at)

        broken._train_step = train_step  # type: ignore[method-assign]
        with pytest.raises(Broken):
            broken.run()
        going_on = Trainer(run)
        going_on.run()
        first_steps.append(going_on.first_step)
    return first_steps


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(f"{run_dir / 'tensorboard'}").Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_curves_are_the_lines_of_the_run_folder_and_no_step_is_there_twice(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(list(topics.values())[:8]))  # a short one, since the tokenizer is learnt in every run
    short: dict[str, Any] = {"data__name": "text_file", "data__path": f"{text}", "training__sample_tokens": 0}
    short |= {"training__steps": 8, "training__log_every_steps": 1, "checkpoint": CheckpointConfig(every_steps=3)}
    runs = [
        small_run(tmp_path / detail, **short, telemetry__tensorboard=True, telemetry__detail=detail)
        for detail in ("brief", "detailed")
    ]
    assert run_ranks(train_in_two_parts, 1, *runs, timeout_s=180) == [[3, 3]]
    shown = {}
    for run in runs:
        detail, lines = run.telemetry.detail, read_metrics(run.run_dir)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
        shown[detail] = curves(Path(run.run_dir))
        assert {"train/loss", "eval/loss", "moe/mean_k", f"moe/live_experts/{LAYER}"} <= set(shown[detail])
        for name, points in shown[detail].items():
            told = [(line["step"], line[name]) for line in lines if name in line]
            assert [step for step, _ in points] == [step for step, _ in told], name
            # TensorBoard keeps 32 bits of a number.
            assert [value for _, value in points] == pytest.approx([value for _, value in told], rel=1e-6), name
        written = {name for line in lines for name in line} - {"step", "time_s"}
        assert written >= OF_THE_LAYER
        assert set(shown[detail]) == {name for name in written if detail == "detailed" or tier_of(name) == "brief"}
    assert not OF_THE_LAYER & set(shown["brief"])
