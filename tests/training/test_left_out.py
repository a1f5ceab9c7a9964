"""Samples that cannot be used when it is their turn: counted on all ranks and named at the end, or the end of all."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tests.helpers.spawn import allow_workers, run_ranks
from tests.helpers.vision_language import tiny_run, write_digits

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.data import BrokenSamples, ConversationExamples, HeldOutOrder
from dynmoe_ds.errors import DynMoEError
from dynmoe_ds.telemetry import read_metrics
from dynmoe_ds.training import Trainer
from dynmoe_ds.training.left_out import left_out_metrics, tell_left_out
from dynmoe_ds.training.predictions import predict
from dynmoe_ds.training.tasks.vision_language import answer_losses


def test_nothing_is_said_where_nothing_can_be_left_out_or_was(caplog: pytest.LogCaptureFixture) -> None:
    assert left_out_metrics(None) == []
    (metric,) = left_out_metrics(BrokenSamples())
    assert (metric.name, metric.value, metric.reduction) == ("train/left_out_samples", 0, "sum")
    for left_out in (None, BrokenSamples()):
        tell_left_out(left_out)
    assert caplog.messages == []


def break_an_image(digits: Path, folder: Path) -> Path:
    """A copy of the training data whose first two pictures are of no use, and no samples but ten with pictures."""
    samples = [sample for sample in json.loads((digits / "train.json").read_text()) if "image" in sample][:10]
    for number, sample in enumerate(samples):
        image = digits / "images" / sample["image"]
        (folder / f"{number}.png").write_bytes(b"no image" if number < 2 else image.read_bytes())
        sample |= {"id": f"sample-{number}", "image": f"{number}.png"}
    (folder / "train.json").write_text(json.dumps(samples))
    (folder / "held_out.json").write_text(json.dumps(samples[2:]))
    return folder


def configuration(digits: str, folder: str, num_ranks: int, *overrides: str) -> RunConfig:
    """Ten steps of a sample per rank: on two ranks two passes over what `break_an_image` left."""
    files = [
        f"data.{key}={folder}/{name}" for key, name in (("path", "train.json"), ("held_out_path", "held_out.json"))
    ]
    return tiny_run(
        Path(digits), Path(folder) / "run", "projector", *files, f"data.image_folder={folder}", "data.group=false",
        f"parallel.num_ranks={num_ranks}", "training.micro_batch_size=1", "training.steps=10",
        "training.eval_every_steps=10", *overrides,
    )  # fmt: skip


def train_on_broken(rank: int, world_size: int, digits: str, folder: str) -> tuple[list[str], list[int]]:
    """Two passes over them: what is said as warnings and errors, and which sample this rank's turn was at each step."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    handler.setLevel(logging.WARNING)
    logging.getLogger("dynmoe_ds").addHandler(handler)
    trainer = Trainer(configuration(digits, folder, world_size, "data.on_broken=skip", "training.log_every_steps=5"))
    order = trainer.training_order
    indices = [order.indices(step, 0)[0] for step in range(10)]
    trainer.run()
    return told, indices


def test_images_that_cannot_be_decoded_are_counted_over_ranks(tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "digits")
    found = run_ranks(train_on_broken, 2, f"{digits}", f"{break_an_image(digits, tmp_path)}", timeout_s=200)
    of_first, of_all = (sum(index < 2 for _, indices in found for index in indices[:steps]) for steps in (5, 10))
    assert of_all == 4, "two passes over the ten samples"
    logged = [line["train/left_out_samples"] for line in read_metrics(tmp_path / "run")]
    assert logged == [of_first, of_all]
    first, second = (told for told, _ in found)
    assert sum("is left out: " in message for message in first + second) >= of_all
    (said,) = [message for message in first if "a training sample was left out" in message]
    assert said.startswith("4 times a training sample was left out.\n  - 4 x an image cannot be decoded: sample-")
    assert not any("a training sample was left out" in message for message in second)


def stop_at_broken(rank: int, world_size: int, digits: str, folder: str) -> tuple[list[tuple[str, int]], list[int]]:
    """How training without and with a worker ends and after how many steps, then evaluations; the turns as above."""
    allow_workers()
    found = []

    def note(error: DynMoEError) -> None:
        found.append((f"{type(error).__name__}: {error}", trainer.engine.global_steps))

    for num_workers in (0, 1):
        own = [f"run_dir={folder}/{num_workers}", "data.on_broken=stop", f"data.num_workers={num_workers}"]
        trainer = Trainer(configuration(digits, folder, world_size, *own))
        with pytest.raises(DynMoEError) as raised:
            trainer.run()
        note(raised.value)
    assert isinstance(trainer.task.train, ConversationExamples)
    examples = replace(trainer.task.train, samples=trainer.task.train.samples[1:3])  # the first is broken
    order = HeldOutOrder(num_sequences=2, micro_batch_size=1, rank=rank, world_size=world_size)
    for evaluate in (answer_losses, predict):
        with pytest.raises(DynMoEError) as raised:
            evaluate(trainer.engine, examples, order)
        note(raised.value)
    return found, [trainer.training_order.indices(step, 0)[0] for step in range(10)]


@pytest.mark.timeout(200)
def test_a_broken_image_stops_every_rank_where_one_rank_reads_it(tmp_path: Path) -> None:
    digits = write_digits(tmp_path / "digits")
    found = run_ranks(stop_at_broken, 2, f"{digits}", f"{break_an_image(digits, tmp_path)}", timeout_s=150)
    turns = list(zip(*(indices for _, indices in found), strict=True))
    last = next(step for step, indices in enumerate(turns) if min(indices) < 2)
    (reader,) = (rank for rank, index in enumerate(turns[last]) if index < 2)
    assert last > 0, "nothing was trained before"
    training = (reader, turns[last][reader])
    for ending, (of_rank, index) in enumerate((training, training, (0, 1), (0, 1))):
        said = f"DataError: {tmp_path}/{index}.png cannot be read as an image"
        quoted = f"DivergenceError: Another rank failed, so this one stops too. rank {of_rank}: {said}"
        for rank, (endings, _) in enumerate(found):
            message, num_steps = endings[ending]
            assert message.startswith(said if rank == of_rank else quoted) and num_steps == last
