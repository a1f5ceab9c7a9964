"""One run on this rank, from its configuration to its folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

import torch.distributed as dist

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.errors import EXIT_PREEMPTED, ConfigError, DynMoEError, LaunchError
from dynmoe_ds.telemetry.run_state import forget_stop, note_stop
from dynmoe_ds.training.run_checkpoints import Preempted
from dynmoe_ds.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, should_stop: Callable[[], bool] | None = None) -> None:
    """Train as `config` says and leave the run folder behind; what `dynmoe train` calls on every rank.

    Why it ended early is noted in the run folder, for who looks at it from elsewhere.

    Collective: every rank. Raises: KeyboardInterrupt, after what was written has been put in order; SystemExit with
    code 85, with a checkpoint written, after `should_stop` was true on any rank.
    """
    if os.environ.get("RANK", "0") == "0":
        forget_stop(config.run_dir)
    try:
        trainer = Trainer(config, stream=sys.stderr if sys.stderr.isatty() else None, should_stop=should_stop)
        trainer.run()
    except Preempted as stopped:
        # Rank 0 draws its report, and as soon as one rank has left the launcher stops the others.
        dist.barrier()
        if dist.get_rank() == 0:
            note_stop(config.run_dir, EXIT_PREEMPTED, f"{stopped}")
            logger.info("%s %s", stopped, _how_to_go_on(config))
        raise SystemExit(EXIT_PREEMPTED) from stopped
    except (ConfigError, LaunchError):
        raise  # refused: the folder may be of another run
    except KeyboardInterrupt:
        note_stop(config.run_dir, 130, "It was interrupted.")
        raise
    except DynMoEError as error:
        note_stop(config.run_dir, 2, f"{error}")
        raise
    except Exception as error:
        note_stop(config.run_dir, 1, f"{type(error).__name__}: {error}")
        raise
    # Only after success: after a failure the other ranks may still be inside a collective.
    dist.destroy_process_group()


def _how_to_go_on(config: RunConfig) -> str:
    if config.checkpoint.resume == "auto":
        return "The same command with the same run_dir goes on from there."
    return (
        f"checkpoint.resume is {config.checkpoint.resume}, so the same command will refuse this run_dir; with "
        "checkpoint.resume=auto it goes on from there."
    )
