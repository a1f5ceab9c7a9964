"""`dynmoe train`: check the configuration, start the ranks under the deepspeed launcher; on a rank, train."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dynmoe_ds.cli import launcher_watch
from dynmoe_ds.cli.given_ranks import adopt_rank
from dynmoe_ds.cli.help_text import EXIT_CODES, override_help
from dynmoe_ds.cli.lasting_imports import lasting_imports
from dynmoe_ds.cli.stop_requests import StopRequests
from dynmoe_ds.errors import ConfigError, DynMoEError
from dynmoe_ds.launching.variables import EXIT_NOTE_VARIABLE, STOP_FILE_VARIABLE

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from dynmoe_ds.config.schema import RunConfig

# The launcher looks every second for a rank that failed and stops the others: whoever waits longer is not heard twice.
_LATER_S = 3.0

_EXAMPLES = """examples:
  dynmoe train experiment=demo
  dynmoe train experiment=smoke parallel=single
  dynmoe train experiment=demo adaptation=none run_dir=runs/fixed-pool
  dynmoe train data=text_file data.path=book.txt training.steps=1000
  dynmoe train --multirun run_dir=runs/rates optim.lr=1e-3,3e-4 seed=0,1    four runs, and a table of what came of them

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
    parser.add_argument("--config", metavar="FILE", help="train what a config.yaml says, instead of overrides")
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="several values for a key (seed=0,1): a run for each combination, one after the other, as `dynmoe launch`",
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or SECTION.KEY=VALUE")
    parser.set_defaults(run=_run_one_or_several)


def _run_one_or_several(arguments: argparse.Namespace) -> int:
    """Raises: ConfigError as `run`, as `dynmoe launch`, and where there is one run only."""
    if not arguments.multirun:
        return run(arguments)
    from dynmoe_ds.cli import launch

    adopt_rank(os.environ)
    if "RANK" in os.environ:
        raise ConfigError("`dynmoe train --multirun` starts launchers itself. Under a launcher leave out --multirun.")
    if arguments.config is not None:
        raise ConfigError(f"--config {arguments.config} is one run, but --multirun is for several. Leave out one.")
    return launch.check_and_launch(arguments.overrides, needs_sweep=True)


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks and wait for them, or be one of them.

    Raises: ConfigError with every fault, before any process is started.
    """
    adopt_rank(os.environ)
    if "RANK" in os.environ:
        return _run_rank(arguments)
    with lasting_imports():
        from dynmoe_ds.cli import launcher

        config = _config(arguments)
    num_ranks = config.parallel.num_ranks
    launcher.check_devices(num_ranks)
    environment = launcher.rank_environment(os.environ, num_ranks=num_ranks, run_dir=config.run_dir)
    own = arguments.overrides if arguments.config is None else ["--config", arguments.config]
    command = launcher.launch_command(own, environment, num_ranks=num_ranks)
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    print(f"dynmoe: starting {ranks}; run folder {config.run_dir}; Ctrl-C stops", flush=True)
    code = launcher.supervise(command, environment)
    if code:
        from dynmoe_ds.telemetry.run_state import note_stop

        note_stop(config.run_dir, code, f"The exit code is {code}.")  # unless a rank has said more
    return code


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that the command names. Raises: ConfigError with every fault."""
    from dynmoe_ds.config.load import load_config, read_config

    if arguments.config is None:
        return load_config(arguments.overrides)
    if arguments.overrides:
        raise ConfigError(
            f"--config {arguments.config} is a whole configuration, but there are overrides, too "
            f"({' '.join(arguments.overrides)}). Leave out the one or the others."
        )
    return read_config(arguments.config)


def _run_rank(arguments: argparse.Namespace) -> int:
    """Train on this rank.

    Whatever goes wrong ends the process at once: leaving through the interpreter would wait for other ranks in the
    destruction of the process groups, and the launcher can only stop them after this rank is gone.
    """
    requests = StopRequests()
    requests.listen()
    if path := os.environ.get(STOP_FILE_VARIABLE):
        requests.listen_to_file(Path(path))
    _follow_launchers(requests)
    rank, world_size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    _show_log(rank)
    _hide_known_noise()
    # What one rank finds wrong, every rank reports. Rank 0 speaks first; another is heard if it fails alone. An error
    # of another kind may follow from a rank that is gone: that rank is heard first.
    try:
        _train(arguments, world_size, requests.is_asked)
    except DynMoEError as error:
        _wait(rank > 0 and world_size > 1, requests)
        print(f"[rank {rank}] {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        _leave(130)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        _note(code)
        _leave(code)
    except Exception as error:
        _wait(world_size > 1, requests)
        if lost := _lost_rank(error):
            print(f"[rank {rank}] {lost}", file=sys.stderr)
        print(f"[rank {rank}] {traceback.format_exc()}", end="", file=sys.stderr)
        _leave(1)
    _note(0)
    return 0


def _lost_rank(error: Exception) -> str | None:
    """What to read before the traceback of an error that comes of a rank that is gone or hangs."""
    from dynmoe_ds.distributed import describe_lost_rank

    described = describe_lost_rank(error)
    if described is None:
        return None
    return (
        f"{described} What that rank or the launcher said last may tell why; one that said nothing may have run out of "
        "memory. parallel.process_group_timeout_s is how long ranks wait for each other. The same command goes on from "
        "the latest checkpoint, if there is one and checkpoint.resume is auto."
    )


def _train(arguments: argparse.Namespace, world_size: int, should_stop: Callable[[], bool]) -> None:
    """Check the configuration against the ranks there are, then train.

    Raises: ConfigError for another number of ranks than configured.
    """
    with lasting_imports():
        config = _config(arguments)
    if config.parallel.num_ranks != world_size:
        raise ConfigError(
            f"parallel.num_ranks is {config.parallel.num_ranks} but the launcher started {world_size}. Add "
            f"parallel.num_ranks={world_size}, or start {config.parallel.num_ranks} ranks."
        )
    with lasting_imports():
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


def _hide_known_noise() -> None:
    """Of DeepSpeed 0.19 about its own calls, on every rank, at the first step; nothing a user can act on."""
    for name, other in (("all_gather_into_tensor", "all_gather"), ("reduce_scatter_tensor", "reduce_scatter")):
        text = re.escape(f"`torch.distributed.{name}` is deprecated. Please use `torch.distributed.{other}")
        warnings.filterwarnings("ignore", message=text, category=FutureWarning)


def _follow_launchers(requests: StopRequests) -> None:
    """End with a checkpoint when the launcher is killed, and at once if the front end has gone already."""
    launchers = launcher_watch.find_launchers(os.environ)
    if launchers is None:
        _leave(1)
    launcher_watch.watch(launchers, requests.ask)


def _wait(needed: bool, requests: StopRequests) -> None:
    """Let another rank be heard first; the launcher stops this one meanwhile if that is the case."""
    before, end = requests.num_terminations, time.monotonic() + _LATER_S
    while needed and time.monotonic() < end:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            _leave(130)
        if requests.num_terminations > before:
            _leave(128 + signal.SIGTERM)


def _note(code: int) -> None:
    """Tell the front end an exit code on which launchers cannot be relied: see `launcher.supervise`."""
    if path := os.environ.get(EXIT_NOTE_VARIABLE):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{code}", encoding="utf-8")


def _leave(code: int) -> NoReturn:
    """End this process now, without the interpreter's clean-up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # of a terminal that was closed
            stream.flush()
    os._exit(code)
