"""The tensors of a folder as transformers writes it: safetensors or `pytorch_model.bin`, in one file or in shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynmoe_ds.errors import CheckpointError

_ENDINGS = {".safetensors": "model", ".bin": "pytorch_model"}
"""How files of weights begin, by their ending; the first ending of which there are files is read."""


class FolderTensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for, on the CPU.

    With an index file (`….index.json`) the shards that it names are read, else all files `model*.safetensors` or, if
    there are none, `pytorch_model*.bin`. These are opened with `weights_only=True`, so no code in them runs.

    Raises: CheckpointError, naming the file, for a folder without weights, a shard that is missing or damaged, or a
    tensor that is in two files.
    """

    def __init__(self, folder: Path) -> None:
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(folder):
            for name, (shape, read) in _open(path).items():
                if name in self._readers:
                    raise CheckpointError(
                        f"{name} is in {path} and in another file of weights beside it. Leave one set of files there, "
                        "or the index file that says which belong together."
                    )
                self._readers[name], self._shapes[name] = read, shape

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._shapes[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A tensor by the name it is stored under, or the `index`-th of `parts` equal parts of its first dimension."""

    name: str
    index: int = 0
    parts: int = 1


class TensorViews(Mapping[str, Tensor]):
    """Tensors under other names, and parts of tensors; each is read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], views: Mapping[str, View]) -> None:
        self._tensors, self._views = tensors, views

    def __getitem__(self, name: str) -> Tensor:
        view = self._views[name]
        return self._tensors[view.name].chunk(view.parts)[view.index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        view = self._views[name]
        shape = tensor_shape(self._tensors, view.name)
        if view.parts == 1 or shape[0] % view.parts:  # no equal parts: then the whole shape is what does not fit
            return shape
        return (shape[0] // view.parts, *shape[1:])


def tensor_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of one of `tensors`, from its file's header where it lies in a file."""
    return tensors.shape(name) if isinstance(tensors, FolderTensors | TensorViews) else tuple(tensors[name].shape)


def _weight_files(folder: Path) -> list[Path]:
    for ending, start in _ENDINGS.items():
        index = folder / f"{start}{ending}.index.json"
        if index.exists():
            return _indexed_files(index)
        if files := sorted(folder.glob(f"{start}*{ending}")):
            return files
    raise CheckpointError(
        f"{folder} holds no weights: neither {' nor '.join(f'{start}*{end}' for end, start in _ENDINGS.items())}. Give "
        "the folder of the checkpoint itself."
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        files = sorted({index.parent / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is damaged: {type(error).__name__} {error}. Copy the whole folder again."
        ) from error
    if missing := [path.name for path in files if not path.exists()]:
        raise CheckpointError(f"{index} names {', '.join(missing)}, which is not there. Copy the whole folder again.")
    return files


def _open(path: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """Shape and reader of every tensor of a file by name."""
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {
                name: (tuple(file.get_slice(name).get_shape()), _reader(file, name)) for name in sorted(file.keys())
            }
        # Mapped from the file: what is not asked for, such as the experts of other ranks, is never read.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: (tuple(tensor.shape), _getter(tensor)) for name, tensor in found.items()}
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of tensors: {type(error).__name__} {error}. Copy the folder again."
        ) from error


def _reader(file: Any, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


def _getter(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor
