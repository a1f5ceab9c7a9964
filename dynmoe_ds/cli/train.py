"""`dynmoe train`: check the configuration, start the ranks under the deepspeed launcher; on a rank, train."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from dynmoe_ds.cli.help_text import EXIT_CODES, override_help
from dynmoe_ds.errors import ConfigError, DynMoEError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

# The launcher looks every second for a rank that failed and stops the others: whoever waits longer is not heard twice.
_LATER_S = 3.0

_EXAMPLES = """examples:
  dynmoe train experiment=demo
  dynmoe train experiment=smoke parallel=single
  dynmoe train experiment=demo adaptation=none run_dir=runs/fixed-pool
  dynmoe train data=text_file data.path=book.txt training.steps=1000

The ranks are started here, under the `deepspeed` launcher, unless a launcher has done so already (it sets RANK):
  deepspeed --no_local_rank --num_gpus 2 --module dynmoe_ds train run_dir=runs/first experiment=demo
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "train",
        help="train a model",
        description="Train a model. The configuration is checked before anything is started; everything the run "
        "leaves behind is in its run folder, the trained model as `model/` (dynmoe_ds.load_model reads it) unless "
        "training.save_model=false.",
        epilog=f"{_EXAMPLES}\n{override_help()}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or SECTION.KEY=VALUE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks and wait for them, or be one of them.

    Raises: ConfigError with every fault, before any process is started.
    """
    if "RANK" in os.environ:
        return _run_rank(arguments.overrides)
    from dynmoe_ds.cli import launcher
    from dynmoe_ds.config.load import load_config

    config = load_config(arguments.overrides)
    num_ranks = config.parallel.num_ranks
    launcher.check_devices(num_ranks)
    environment = launcher.rank_environment(os.environ, num_ranks=num_ranks, run_dir=config.run_dir)
    command = launcher.launch_command(arguments.overrides, environment, num_ranks=num_ranks)
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    print(f"dynmoe: starting {ranks}; run folder {config.run_dir}; Ctrl-C stops", flush=True)
    return launcher.supervise(command, environment)


def _run_rank(overrides: Sequence[str]) -> int:
    """Train on this rank.

    Whatever goes wrong ends the process at once: leaving through the interpreter would wait for other ranks in the
    destruction of the process groups, and the launcher can only stop them after this rank is gone.
    """
    _interrupt_once()
    should_stop = _stop_on_signal()
    rank, world_size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    _show_log(rank)
    # What one rank finds wrong, every rank reports. Rank 0 speaks first; another is heard if it fails alone. An error
    # of another kind may follow from a rank that is gone: that rank is heard first.
    try:
        _train(overrides, world_size, should_stop)
    except DynMoEError as error:
        _wait(rank > 0 and world_size > 1)
        print(f"[rank {rank}] {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        _leave(130)
    except SystemExit as leaving:
        _leave(leaving.code if isinstance(leaving.code, int) else 1)
    except Exception:
        _wait(world_size > 1)
        print(f"[rank {rank}] {traceback.format_exc()}", end="", file=sys.stderr)
        _leave(1)
    return 0


def _train(overrides: Sequence[str], world_size: int, should_stop: Callable[[], bool]) -> None:
    """Check the configuration against the ranks there are, then train.

    Raises: ConfigError for another number of ranks than configured.
    """
    from dynmoe_ds.config.load import load_config

    config = load_config(overrides)
    if config.parallel.num_ranks != world_size:
        raise ConfigError(
            f"parallel.num_ranks is {config.parallel.num_ranks} but the launcher started {world_size}. Add "
            f"parallel.num_ranks={world_size}, or start {config.parallel.num_ranks} ranks."
        )
    from dynmoe_ds.training.run import train

    train(config, should_stop)


def _show_log(rank: int) -> None:
    """Let this package's log be seen: all of rank 0's, and the errors of the others, with their number."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log = logging.getLogger("dynmoe_ds")
    log.addHandler(handler)
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    log.propagate = False


def _interrupt_once() -> None:
    """Make KeyboardInterrupt of the first SIGINT or SIGTERM and ignore what follows, so that a run can end in order.

    Ctrl-C comes twice: as SIGINT from the front end, and as SIGTERM from the launcher, which then waits for 30 s.
    """

    is_interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Remembered rather than set to SIG_IGN, about which Python complains when the second signal is already here.
        nonlocal is_interrupted
        if not is_interrupted:
            is_interrupted = True
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _stop_on_signal() -> Callable[[], bool]:
    """Whether SIGUSR1 has come, which asks for a checkpoint and an end (Slurm: `--signal=USR1@120`)."""
    asked = threading.Event()
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.set())
    return asked.is_set


def _wait(needed: bool) -> None:
    """Let another rank be heard first; the launcher stops this one meanwhile if that is the case."""
    if needed:
        try:
            time.sleep(_LATER_S)
        except KeyboardInterrupt:
            _leave(130)


def _leave(code: int) -> NoReturn:
    """End this process now, without the interpreter's clean-up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
