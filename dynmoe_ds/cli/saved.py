"""The model of a run, for the verbs that use one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynmoe_ds.training.saved_run import SavedRun

RUN_HELP = (
    "the folder of a run, for the model of its end or else its latest checkpoint; or one of its checkpoints; or a "
    "folder of `dynmoe import`"
)
MODEL_HELP = f"{RUN_HELP} or `dynmoe export`"


def open_saved(path: str) -> SavedRun:
    """The run at `path`; says on stderr where its model is from. Raises: as `SavedRun`."""
    from dynmoe_ds.training.saved_run import SavedRun

    saved = SavedRun(path)
    print(f"dynmoe: using {saved.source}", file=sys.stderr)
    return saved
