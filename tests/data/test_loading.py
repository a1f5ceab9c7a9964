"""Batches from worker processes: the same as without, whatever is wrong with examples, and no process that stays."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from tests.data.test_llava import SAMPLES, load
from tests.helpers.images import write_images
from torch import Tensor

from dynmoe_ds.config.schema import ImageFolderConfig
from dynmoe_ds.data import BatchLoader, ConversationExamples, TrainingOrder, load_image_folder
from dynmoe_ds.errors import DataError

NUM_STEPS = 8


def order(num_sequences: int, **values: int) -> TrainingOrder:
    settings = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "rank": 0, "world_size": 1}
    return TrainingOrder(**{"seed": 0, "num_sequences": num_sequences} | settings | values)


def loader(examples: ConversationExamples, num_workers: int) -> BatchLoader:
    return BatchLoader(examples, order(len(examples)), num_steps=NUM_STEPS, num_workers=num_workers)


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two
        return False


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return list(filter(is_worker, process.children(recursive=True)))


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_give_what_the_rank_itself_would_and_their_end_is_noticed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = SAMPLES[0] | {"id": "bad", "image": "broken.png"}
    examples = load(folder, [*SAMPLES, bad], on_broken="skip").train
    packed = examples.packed(examples.length(2) + examples.length(1), 0, is_grouped=False)
    assert len(packed) < len(examples)
    here, elsewhere = loader(packed, 0), loader(packed, 2)
    places = [(step, micro_step) for step in range(2, NUM_STEPS) for micro_step in range(2)]
    before, handler = torch.random.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    with caplog.at_level(logging.ERROR):
        wanted = [here.batch(*place) for place in places]
        told = list(caplog.messages)
        caplog.clear()
        got = [elsewhere.batch(*place) for place in places]
    assert all(map(same, got, wanted)), "from the middle of an epoch on"
    assert caplog.messages == told and any("Sample bad is left out" in message for message in told)
    assert same(elsewhere.batch(2, 1), wanted[1]), "as after a roll-back"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert len(workers_of(psutil.Process())) == 2
    workers_of(psutil.Process())[0].kill()
    with pytest.raises(DataError, match=r"that makes batches was killed .*data.num_workers is 2: use fewer"):
        [elsewhere.batch(*place) for place in places[2:]]
    elsewhere.close()
    wait_until(lambda: not workers_of(psutil.Process()))


def test_a_broken_image_stops_the_run_and_crops_are_those_of_their_epoch(tmp_path: Path) -> None:
    write_images(tmp_path)
    config = ImageFolderConfig(path=f"{tmp_path}", image_size=8)
    examples = load_image_folder(config, seed=0).train
    broken = replace(examples, files=(*examples.files[:-1], tmp_path / "gone.png"))
    line = order(len(broken))
    numbers = [line.indices(step, micro) for step in range(NUM_STEPS) for micro in range(2)]
    gone = next(number for number, indices in enumerate(numbers) if len(broken) - 1 in indices)
    elsewhere = BatchLoader(broken, line, num_steps=NUM_STEPS, num_workers=1)
    for number in range(gone):
        step, micro = divmod(number, 2)
        want = examples.batch(line.indices(step, micro), epochs=line.epochs(step, micro))
        assert same(elsewhere.batch(step, micro), want)
    with pytest.raises(DataError, match=r"gone.png cannot be read as an image"):
        elsewhere.batch(*divmod(gone, 2))
    elsewhere.close()


PARENT = """
from tests.data.test_loading import Endless, order
from dynmoe_ds.data import BatchLoader
if __name__ == "__main__":
    loader = BatchLoader(Endless(), order(4), num_steps=10**6, num_workers=1)
    for step in range(10**6):
        loader.batch(step, 0), loader.batch(step, 1)
        if step == 2:
            print("going", flush=True)
"""


class Endless:
    """Examples of nothing."""

    def __len__(self) -> int:
        return 4

    def batch(self, indices: object, device: object = "cpu", epochs: object = None) -> dict[str, Tensor]:
        return nothing()

    def job(self, indices: object, epochs: object = None) -> Callable[[], dict[str, Tensor]]:
        return nothing


def nothing() -> dict[str, Tensor]:
    time.sleep(0.05)
    return {}


def test_workers_do_not_outlive_their_rank(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}"}
    command, quiet = [sys.executable, f"{tmp_path}/parent.py"], subprocess.DEVNULL
    numbers = (signal.SIGKILL, signal.SIGINT)
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=quiet, start_new_session=True)
        for _ in numbers
    ]
    try:
        for rank, number in zip(ranks, numbers, strict=True):
            if number == signal.SIGKILL:  # while its worker has only begun to import
                wait_until(lambda: bool(workers_of(psutil.Process(rank.pid))))  # noqa: B023
                time.sleep(0.2)
            else:
                assert rank.stdout is not None and rank.stdout.readline() == b"going\n"
            started = psutil.Process(rank.pid).children(recursive=True)
            assert len(workers_of(psutil.Process(rank.pid))) == 1
            os.killpg(rank.pid, number)  # as Ctrl-C and launchers do
            rank.wait(60)
            wait_until(lambda: not any(map(is_running, started)))  # noqa: B023
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
