"""One run from its configuration to its end: what it says when it was asked to stop, with an exit code."""

from __future__ import annotations

import logging
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from tests.helpers.run_config import changed, small_run
from tests.helpers.spawn import run_ranks

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.errors import ConfigError, DataError
from dynmoe_ds.telemetry.run_folder import STOPPED_FILE
from dynmoe_ds.telemetry.run_state import Progress, read_state
from dynmoe_ds.training import run as run_module


def stop_after_one_step(rank: int, world_size: int, run: RunConfig) -> tuple[object, str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    run_module.logger.addHandler(handler)
    run_module.logger.setLevel(logging.INFO)
    try:
        run_module.train(run, lambda: True)
    except SystemExit as leaving:
        return leaving.code, said[-1]
    return None, "not stopped"


def test_a_run_that_stops_says_how_it_goes_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(list(topics.values())[:8]))  # a short one, since the tokenizer is learnt in every run
    short: dict[str, Any] = {"data__name": "text_file", "data__path": f"{text}"}
    short |= {"training__sample_prompt": "", "training__sample_tokens": 0}
    advice = {
        "auto": "The same command with the same run_dir goes on from there.",
        "never": "checkpoint.resume is never, so the same command will refuse this run_dir; with "
        "checkpoint.resume=auto it goes on from there.",
    }
    for resume, sentence in advice.items():
        run = changed(small_run(tmp_path / resume, **short), checkpoint__resume=resume)
        [(code, said)] = run_ranks(stop_after_one_step, 1, run, timeout_s=120)
        path = tmp_path / resume / "checkpoints" / "step-00000001"
        assert code == 85
        assert said == f"Stopped after optimiser step 1, as asked. {path} was written. {sentence}"
        state = read_state(tmp_path / resume)
        assert state.word == "stopped"
        assert state.told.endswith(f"Stopped after optimiser step 1, as asked. {path} was written.")


class Failing:
    """Stands for the trainer of a run that ends by `error`."""

    error: BaseException

    def __init__(self, config: RunConfig, **_: object) -> None:
        assert not (Path(config.run_dir) / STOPPED_FILE).exists(), "of an earlier part of the run"

    def run(self) -> None:
        raise self.error


def test_why_a_run_ended_early_is_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(run_module, "Trainer", Failing)
    run = small_run(tmp_path)
    for error, told in (
        (DataError("No text."), "Failed at step 0 of {0}. No text."),
        (RuntimeError("peer is gone"), "Failed at step 0 of {0}. RuntimeError: peer is gone"),
        (KeyboardInterrupt(), "Stopped at step 0 of {0}. It was interrupted."),
        (ConfigError("run_dir is of another run."), "Not started: no metrics.jsonl yet."),
    ):
        Failing.error = error
        with pytest.raises(type(error)):
            run_module.train(run)
        assert read_state(tmp_path, Progress(planned=3)).told == told.format(3)
