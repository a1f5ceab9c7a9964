"""One run on this rank, from its configuration to its folder."""

from __future__ import annotations

import sys

import torch.distributed as dist

from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.training.trainer import Trainer


def train(config: RunConfig) -> None:
    """Train as `config` says and leave the run folder behind; what `dynmoe train` calls on every rank.

    Collective: every rank. Raises: KeyboardInterrupt, after what was written has been put in order.
    """
    Trainer(config, stream=sys.stderr if sys.stderr.isatty() else None).run()
    # Only after success: after a failure the other ranks may still be inside a collective.
    dist.destroy_process_group()
