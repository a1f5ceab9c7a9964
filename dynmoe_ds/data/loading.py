"""The training batches of a rank, made ahead of time by other processes, or at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dynmoe_ds.data.examples import Examples, SlowExamples
from dynmoe_ds.data.order import TrainingOrder
from dynmoe_ds.errors import DataError

Batch = dict[str, Tensor]
Job = Callable[[], Batch]


class BatchLoader:
    """The batches of `order`, of `num_steps` steps, on `device`: the same with workers as without.

    num_workers: processes that make them ahead of time, with `SlowExamples` alone; 0 for none. They begin with the
    first batch and end with `close`, or with this process, however it ends. A batch that a worker cannot make is made
    here, so that what is done about an example that cannot be read is done, and said, by `Examples.batch` either way.
    """

    def __init__(
        self,
        examples: Examples,
        order: TrainingOrder,
        *,
        num_steps: int,
        num_workers: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._examples, self._order, self._device = examples, order, device
        self._workers: _Workers | None = None
        if num_workers > 0:
            assert isinstance(examples, SlowExamples), type(examples).__name__
            self._workers = _Workers(_Jobs(examples, order, num_steps), num_workers)

    def batch(self, step: int, micro_step: int) -> Batch:
        """The batch of a micro step; both counts begin at 0. In their order, or from any place anew.

        Raises: DataError for examples that cannot be used, and for a worker that was killed.
        """
        made = None if self._workers is None else self._workers.batch(step, micro_step)
        if made is not None:
            return {name: tensor.to(self._device) for name, tensor in made.items()}
        order = self._order
        return self._examples.batch(order.indices(step, micro_step), self._device, order.epochs(step, micro_step))

    def close(self) -> None:
        """End the workers. They begin again with the next batch."""
        if self._workers is not None:
            self._workers.close()


class _Jobs(Sampler[Job]):
    """The jobs of all micro steps from `first` on, the number of micro steps before it."""

    def __init__(self, examples: SlowExamples, order: TrainingOrder, num_steps: int) -> None:
        self._examples, self._order, self._num_steps = examples, order, num_steps
        self.first = 0

    def number(self, step: int, micro_step: int) -> int:
        return step * self._order.gradient_accumulation_steps + micro_step

    def __iter__(self) -> Iterator[Job]:
        accumulation = self._order.gradient_accumulation_steps
        for number in range(self.first, self._num_steps * accumulation):
            place = divmod(number, accumulation)
            yield self._examples.job(self._order.indices(*place), self._order.epochs(*place))


class _DoneJobs(Dataset[Batch | None]):
    """What jobs make; None for an example that cannot be read. It is all that is sent to a worker when it begins."""

    def __getitem__(self, job: Any) -> Batch | None:
        try:
            made: Batch = job()
        except DataError:
            return None
        return made


class _Workers:
    """Batches from other processes, which follow each other without a gap as long as they are asked for in order."""

    def __init__(self, jobs: _Jobs, num_workers: int) -> None:
        self._jobs, self._num_workers = jobs, num_workers
        self._loader: DataLoader[Batch | None] | None = None
        self._made: Iterator[Batch | None] = iter(())
        self._next: int | None = None

    def batch(self, step: int, micro_step: int) -> Batch | None:
        """None if it cannot be made. Raises: DataError if a worker has ended."""
        number = self._jobs.number(step, micro_step)
        try:
            if number != self._next:
                self._begin(number)
            made = next(self._made)
        except (RuntimeError, EOFError, ConnectionError) as error:
            # The others where a worker's death comes in the middle of what it sends.
            if isinstance(error, RuntimeError) and "exited unexpectedly" not in f"{error}":
                raise
            raise DataError(
                f"A process that makes batches was killed ({error!r}). Most likely memory ran out, or shared memory "
                f"(/dev/shm). data.num_workers is {self._num_workers}: use fewer, or 0 to make them in the rank itself."
            ) from error
        self._next = number + 1
        return made

    def close(self) -> None:
        self._made, self._loader, self._next = iter(()), None, None  # torch ends workers that nobody refers to

    def _begin(self, number: int) -> None:
        """Make the batches from `number` on, by workers that are there already, or new ones."""
        self._jobs.first = number
        if self._loader is None:
            self._loader = DataLoader(
                _DoneJobs(),
                sampler=self._jobs,
                batch_size=None,
                num_workers=self._num_workers,
                # A fork would copy locks of the rank's threads, and its process groups.
                multiprocessing_context="spawn",
                worker_init_fn=_begin_worker,
                # For batches from another place on; and torch ends them when this process exits, also if the traceback
                # of an error still refers to them.
                persistent_workers=True,
                generator=torch.Generator(),  # the global one is left as it is
            )
        handler = signal.getsignal(signal.SIGCHLD)
        self._made = iter(self._loader)
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever this process is when a worker dies; `next` finds out as well.
            signal.signal(signal.SIGCHLD, handler)


def _begin_worker(worker_id: int) -> None:
    """See to it, in a worker, that it ends with the rank and by nothing else."""
    os.setsid()  # Ctrl-C and what else is sent to the rank's group of processes is for the rank to act on
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    """torch's own watch begins later, and would wait for ever for a rank that has gone before."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)
