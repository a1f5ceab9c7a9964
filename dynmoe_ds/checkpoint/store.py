"""Folders of checkpoints: written aside by all ranks, checksummed, published by one rename, found again and checked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dynmoe_ds.checkpoint.json_manifest import manifest_header, read_json_manifest
from dynmoe_ds.checkpoint.publish import aside_of, flush, publish
from dynmoe_ds.distributed import attempt_together
from dynmoe_ds.errors import CheckpointError

T = TypeVar("T")

MANIFEST_FILE = "manifest.json"
SHARED_FILE = "shared.pt"
TENSOR_FOLDER = "tensors"
LATEST_FILE = "latest"
FORMAT = "dynmoe_ds.checkpoint"
FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d+)")
_REPLACED_NAME = re.compile(r"\.step-(\d+)\.replaced")


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What a checkpoint holds, as this rank writes it, on the host.

    step: optimiser steps so far. tensors: this rank's share, by name; every name is one rank's. shared: equal on all
    ranks; rank 0's is written. own: this rank's. Both hold tensors, numbers, texts, lists and dictionaries only.
    described: JSON for the manifest, for people and for `dynmoe inspect`.
    """

    step: int
    tensors: dict[str, Tensor]
    shared: dict[str, Any]
    own: dict[str, Any]
    described: dict[str, Any]

    def check_plain(self) -> None:
        """Raises: CheckpointError, naming the place, for what could be written but not read again."""
        for name, value in {**self.own, **self.shared}.items():
            _check_plain(value, name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One that is there. manifest: what stands in its `manifest.json`. sizes: shape of every tensor by name."""

    path: Path
    manifest: dict[str, Any]
    sizes: dict[str, torch.Size]

    @property
    def step(self) -> int:
        """Optimiser steps that had been taken."""
        return int(self.manifest["step"])

    def check_names(self, expected: Mapping[str, torch.Size]) -> None:
        """Raises: CheckpointError unless it has tensors of these names and shapes, and no others."""
        for name, size in expected.items():
            if name not in self.sizes:
                raise CheckpointError(f"{self.path} has no {name}: it is of another model or optimiser.")
            if self.sizes[name] != size:
                raise CheckpointError(
                    f"{self.path} is of another model: {name} has shape {list(self.sizes[name])} there, but "
                    f"{list(size)} here."
                )
        if unknown := sorted(self.sizes.keys() - expected.keys()):
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise CheckpointError(
                f"{self.path} is of another model: it has {unknown[0]}{more}, for which there is no place here."
            )

    def read_tensors(self, wanted: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
        """Fill tensors on the host by name. Collective: every rank of `group`, each with what it wants, if anything.

        Raises: CheckpointError on every rank if they cannot be read. `check_names` first.
        """
        try:
            reader = dcp.FileSystemReader(self.path / TENSOR_FOLDER)
            dcp.load(dict(wanted), storage_reader=reader, process_group=group)
        except Exception as e:  # raised on every rank
            raise CheckpointError(f"The tensors of {self.path} cannot be read: {_reason(e)}") from e

    def read_alone(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name in their own dtype, in this process alone, whatever ranks there are.

        Raises: CheckpointError if they cannot be read.
        """
        try:
            reader = dcp.FileSystemReader(self.path / TENSOR_FOLDER)
            stored = reader.read_metadata().state_dict_metadata
            tensors: dict[str, Tensor] = {}
            for name in names:
                entry = stored[name]
                assert isinstance(entry, TensorStorageMetadata), f"{name} is a {type(entry).__name__}"
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant here
                dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
        except Exception as e:
            raise CheckpointError(f"The tensors of {self.path} cannot be read: {_reason(e)}") from e
        return tensors

    def read_shared(self) -> dict[str, Any]:
        """What was equal on all ranks."""
        return _load(self.path / SHARED_FILE)

    def read_own(self, rank: int) -> dict[str, Any]:
        """What the rank of that number had written."""
        return _load(self.path / _own_file(rank))


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint after `step` optimiser steps."""
    return f"step-{step:08d}"


def write_checkpoint(snapshot: Snapshot, folder: Path, group: dist.ProcessGroup | None) -> Path:
    """Write a checkpoint into `folder`, a folder of checkpoints that all ranks see; its path.

    It is there as a whole, and `latest` names it, or not at all. Collective: every rank of `group`, which must have all
    ranks and work on host memory. Raises: CheckpointError on every rank if any cannot write, with the reason.
    """
    path = folder / checkpoint_name(snapshot.step)
    aside = aside_of(path)
    is_first = dist.get_rank() == 0
    _together(lambda: _prepare(aside) if is_first else None, path, group)
    _together(lambda: _write_own(snapshot, aside, is_first, group), path, group)
    described = _together(lambda: _own_files(aside, is_first), path, group)
    files: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(files, described, group=group)
    _together(lambda: _finish(snapshot, path, aside, files) if is_first else None, path, group)
    return path


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The checkpoint of `step`, by default the one that `latest` names, else the newest that is whole.

    folder: a folder of checkpoints, or a checkpoint itself. Raises: CheckpointError if there is none.
    """
    if (folder / MANIFEST_FILE).is_file() and step is None:
        return folder
    present = list_checkpoints(folder)
    if step is not None:
        if step not in present:
            listed = ", ".join(map(str, present)) or "none"
            raise CheckpointError(f"{folder} has no checkpoint of step {step}. Steps that are there: {listed}.")
        return present[step]
    named = _latest(folder)
    if named is not None:
        return named
    if not present:
        raise CheckpointError(
            f"{folder} has no checkpoint. Give the folder that engine.save_checkpoint wrote into, such as "
            "RUN_DIR/checkpoints."
        )
    return present[max(present)]


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Whole checkpoints in a folder by step, ascending.

    One that was about to be replaced by another of the same step counts as long as that one is not there.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name) or _REPLACED_NAME.fullmatch(path.name)
        if match and (path / MANIFEST_FILE).is_file():
            found.setdefault(int(match.group(1)), path)
    return dict(sorted(found.items()))


def open_checkpoint(path: Path, rank: int = 0, world_size: int = 1) -> Checkpoint:
    """Read and check the manifest, the sizes of all files, and the checksums of this rank's part of the files.

    Raises: CheckpointError, naming the file, for one that is missing, cut off, changed, or of another format.
    """
    manifest = _read_manifest(path / MANIFEST_FILE)
    for index, (name, described) in enumerate(manifest["files"].items()):
        _check_file(path / name, described, with_checksum=index % world_size == rank)
    try:
        stored = dcp.FileSystemReader(path / TENSOR_FOLDER).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"{path / TENSOR_FOLDER} cannot be read: {error}. Use another checkpoint.") from error
    sizes = {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    return Checkpoint(path=path, manifest=manifest, sizes=sizes)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and what attempts that were cut off have left.

    A checkpoint goes by a rename first, so that one half removed is never taken for a whole one. Only between writes.
    """
    present = list_checkpoints(folder)
    for path in [present[step] for step in list(present)[:-keep]]:
        doomed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    kept = set(list_checkpoints(folder).values())
    for path in folder.glob(".step-*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _together(action: Callable[[], T], path: Path, group: dist.ProcessGroup | None) -> T:
    """What `action` gives. Collective: every rank of `group`. Raises: CheckpointError if it fails here, as it does."""

    def attempt() -> T:
        try:
            return action()
        except CheckpointError:
            raise
        except Exception as e:
            raise CheckpointError(
                f"The checkpoint {path} cannot be written: {_reason(e)} Nothing is left of it."
            ) from e

    try:
        return attempt_together(attempt, group)
    except Exception:
        if dist.get_rank() == 0:
            shutil.rmtree(aside_of(path), ignore_errors=True)
        raise


def _prepare(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / TENSOR_FOLDER).mkdir(parents=True)


def _write_own(snapshot: Snapshot, aside: Path, is_first: bool, group: dist.ProcessGroup | None) -> None:
    def write_files() -> None:
        _save(snapshot.own, aside / _own_file(dist.get_rank()))
        if is_first:
            _save(snapshot.shared, aside / SHARED_FILE)

    # Before the collective that follows, which would wait for a rank that cannot write its own.
    attempt_together(write_files, group)
    writer = dcp.FileSystemWriter(aside / TENSOR_FOLDER, sync_files=True)
    dcp.save(snapshot.tensors, storage_writer=writer, process_group=group)


def _own_files(aside: Path, is_first: bool) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file of this rank, by its path in the checkpoint; they are on the disk then."""
    rank = dist.get_rank()
    paths = [aside / _own_file(rank), *sorted((aside / TENSOR_FOLDER).glob(f"__{rank}_*"))]
    if is_first:
        paths += [aside / SHARED_FILE, aside / TENSOR_FOLDER / ".metadata"]
    described = {}
    for path in paths:
        flush(path)
        described[f"{path.relative_to(aside)}"] = {"bytes": path.stat().st_size, "sha256": _checksum(path)}
    return described


def _finish(snapshot: Snapshot, path: Path, aside: Path, files: list[dict[str, Any]]) -> None:
    header = manifest_header(FORMAT, FORMAT_VERSION) | {"step": snapshot.step}
    by_name = {name: described for of_rank in files for name, described in sorted(of_rank.items())}
    text = json.dumps({**header, **snapshot.described, "files": by_name}, indent=1) + "\n"
    (aside / MANIFEST_FILE).write_text(text, encoding="utf-8")
    publish(aside, path)
    latest = path.with_name(LATEST_FILE)
    beside = latest.with_name(f".{LATEST_FILE}.incomplete")
    try:
        beside.write_text(f"{path.name}\n", encoding="utf-8")
        flush(beside)
        beside.replace(latest)
        flush(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} is written, but {latest} cannot be: {_reason(error)} It still names the one before."
        ) from error


def _latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, if both are there."""
    try:
        path = folder / (folder / LATEST_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return path if (path / MANIFEST_FILE).is_file() else None


def _read_manifest(path: Path) -> dict[str, Any]:
    advice = "Use another checkpoint."
    manifest = read_json_manifest(path, FORMAT, FORMAT_VERSION, kind="checkpoint", advice=advice)
    missing = [key for key in ("step", "layers", "files", "layout", "optimizer", "state_names") if key not in manifest]
    if missing:
        raise CheckpointError(f"{path} is damaged: it has no {', '.join(missing)}. Use another checkpoint.")
    return manifest


def _check_file(path: Path, described: Mapping[str, Any], *, with_checksum: bool) -> None:
    try:
        size = path.stat().st_size
        checksum = _checksum(path) if with_checksum and size == described["bytes"] else described["sha256"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Use another checkpoint.") from error
    if size != described["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes but was written with {described['bytes']}: it was cut off. Use another "
            "checkpoint."
        )
    if checksum != described["sha256"]:
        raise CheckpointError(f"{path} has changed since it was written: its checksum differs. Use another checkpoint.")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_plain(value: Any, name: str) -> None:
    """Raises: CheckpointError, naming the place, for a value that could be written but not read again."""
    if type(value) in (dict, OrderedDict):
        for key, part in value.items():
            _check_plain(key, f"A key of {name}")
            _check_plain(part, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, part in enumerate(value):
            _check_plain(part, f"{name}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str, bytes, Tensor):
        raise CheckpointError(
            f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold. Use "
            "tensors, numbers, texts, lists, tuples and dictionaries."
        )


def _save(value: dict[str, Any], path: Path) -> None:
    """As bytes first: torch.save to a full disk does not say that it is full."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)} Use another checkpoint.") from error
    return loaded


def _own_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _reason(error: BaseException) -> str:
    """The innermost cause in words, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    failures = getattr(error, "failures", None)  # torch.distributed.checkpoint: the errors by rank
    if failures:
        rank, (first, _) = next(iter(failures.items()))
        return f"rank {rank}: {_reason(first)}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}."
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    hint = " Is the disk full?" if "StreamWriter" in text or "inline_container" in text else ""
    return f"{type(error).__name__}: {text.removesuffix('.')}.{hint}"
