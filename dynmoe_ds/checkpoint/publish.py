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
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        publish(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def aside_of(folder: Path) -> Path:
    """Where `folder` is written before it is published."""
    return folder.absolute().with_name(f".{folder.absolute().name}.incomplete")


def publish(aside: Path, folder: Path) -> None:
    """Make `aside` appear as `folder` by one rename, everything in it on the disk; it takes the place of one there."""
    for path in (*aside.rglob("*"), aside):
        flush(path)
    replaced = folder.absolute().with_name(f".{folder.absolute().name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists() and any(folder.iterdir()):
        folder.rename(replaced)  # a folder that is not empty cannot be renamed over
    aside.rename(folder)
    flush(folder.absolute().parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """See a file, or the names in a folder, to the disk: a rename must not get there before what it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
