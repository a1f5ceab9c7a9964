"""A vision-language run stopped in mid-epoch goes on as if it had not been, its batches from worker processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tests.helpers.no_report import draw_no_report
from tests.helpers.run_lines import run_lines, what_was_written
from tests.helpers.spawn import allow_workers, run_ranks
from tests.helpers.vision_language import tiny_run, write_digits

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.training.run_checkpoints import Preempted
from dynmoe_ds.training.trainer import Trainer

STOPPED_AFTER = 3
# A window that the stop cuts, and a birth after it.
OVERRIDES = [
    "parallel.zero_stage=2", "training.steps=8", "training.log_every_steps=1", "checkpoint.every_steps=100",
    "adaptation=paper", "adaptation.every_steps=4", "adaptation.window_steps=3", "data.group=true",
    "stage.trained=[vision_tower,projector,language_model]",
]  # fmt: skip
FORMS = {
    "grouped, 2 ranks": ["parallel.num_ranks=2", "parallel.ep_size=2", "training.micro_batch_size=2"],
    "packed, 4 ranks": [
        "parallel.num_ranks=4",
        "parallel.ep_size=2",
        "training.micro_batch_size=1",
        "data.packing=true",
        "data.sequence_length=64",
    ],
}


def configuration(digits: str, folder: str, form: str, num_workers: int) -> RunConfig:
    own = [*OVERRIDES, *FORMS[form], f"data.num_workers={num_workers}"]
    return tiny_run(Path(digits), Path(folder), "experts", *own)


def train_twice(rank: int, world_size: int, digits: str, folder: str, form: str) -> tuple[int, float]:
    """Without a stop and without workers; then with a stop, on two ranks with workers as well.

    The step it went on from, and the epochs before it.
    """
    allow_workers()
    draw_no_report()
    Trainer(configuration(digits, f"{folder}/undisturbed", form, 0)).run()
    stopped, num_steps = configuration(digits, f"{folder}/stopped", form, int(world_size == 2)), itertools.count(1)
    with pytest.raises(Preempted):
        Trainer(stopped, should_stop=lambda: next(num_steps) == STOPPED_AFTER).run()
    trainer = Trainer(stopped)
    order = trainer.training_order
    assert order.grouping is not None and (trainer.task.train.rows is not None) == form.startswith("packed")
    trainer.run()
    return trainer.first_step, trainer.first_step * order.global_batch_size / order.num_sequences


@pytest.mark.parametrize("form", list(FORMS))
def test_a_run_stopped_in_mid_epoch_ends_as_an_undisturbed_one(form: str, tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "digits")
    num_ranks = 4 if "4 ranks" in form else 2
    found = run_ranks(train_twice, num_ranks, f"{digits}", f"{tmp_path}", form, timeout_s=300)
    assert [step for step, _ in found] == [STOPPED_AFTER] * num_ranks
    assert all(0 < epochs < 1 for _, epochs in found), found
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    assert what_was_written(stopped) == what_was_written(undisturbed)
    assert [line["step"] for line in run_lines(stopped, "metrics")] == list(range(1, 9))
    model = "model/model.safetensors"
    assert (stopped / model).read_bytes() == (undisturbed / model).read_bytes()
    events = run_lines(stopped, "adaptation")
    assert any(change["grown"] for change in events[0]["layers"].values()), "nothing was born after the stop"
