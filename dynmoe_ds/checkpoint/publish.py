"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynmoe_ds.errors import CheckpointError


def check_vacant(folder: Path) -> None:
    """Raises: CheckpointError unless `folder` is absent or empty."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder} exists and is not empty. Choose another folder, or move that one away.")
    elif folder.exists():
        raise CheckpointError(f"{folder} exists and is not a folder. Choose another path.")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """An empty folder to write files into, which becomes `folder` by one rename at the end of the `with` block.

    After an error nothing is left of it. A process that is killed leaves `.NAME.incomplete` beside `folder`, which the
    next attempt removes.
    """
    aside = folder.absolute().with_name(f".{folder.absolute().name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.iterdir(), aside):
            _flush(path)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _flush(folder.absolute().parent)


def _flush(path: Path) -> None:
    """See a file, or the names in a folder, to the disk: a rename must not get there before what it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
