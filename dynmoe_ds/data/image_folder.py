"""Images with classes, from folders: `train/<class>/*.jpg` to learn from and `val/<class>/*.jpg` to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynmoe_ds.config.schema import ImageFolderConfig
from dynmoe_ds.data.image_transforms import evaluation_view, normalised, training_view
from dynmoe_ds.data.rank_zero import from_rank_zero
from dynmoe_ds.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_DECODING_THREADS = 4  # PIL decodes outside of Python's lock


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageExamples:
    """Images by index, decoded when a batch is asked for, `size` pixels wide and high.

    labels: indices of classes. seed: governs the crops of training; see `batch`.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    size: int
    seed: int

    def __len__(self) -> int:
        return len(self.files)

    def batch(
        self, indices: Sequence[int], device: torch.device | str = "cpu", epochs: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """`pixel_values` [B, 3, size, size] float32, normalised, and `labels` [B] int64.

        With `epochs`, one per index, each is a random crop that depends on the seed, the epoch and the index alone;
        without, it is the centre.
        Raises: DataError for an image that cannot be read, on the rank that reads it.
        """
        return {name: tensor.to(device) for name, tensor in self.job(indices, epochs)().items()}

    def job(self, indices: Sequence[int], epochs: Sequence[int] | None = None) -> Callable[[], dict[str, Tensor]]:
        places = [None] * len(indices) if epochs is None else zip(epochs, indices, strict=True)
        keys = [None if place is None else [self.seed, *place] for place in places]
        files, labels = [self.files[index] for index in indices], [self.labels[index] for index in indices]
        return partial(_views, files, labels, keys, self.size)


def _views(
    files: Sequence[Path], labels: Sequence[int], keys: Sequence[Sequence[int] | None], size: int
) -> dict[str, Tensor]:
    """A batch of random crops by `keys`, the seeds of each; of the centre where there is none."""

    def view(file: Path, key: Sequence[int] | None) -> Tensor:
        image = read_image(file)
        if key is None:
            return normalised(evaluation_view(image, size))
        return normalised(training_view(image, size, np.random.default_rng(key)))

    with ThreadPoolExecutor(_DECODING_THREADS) as pool:
        return {"pixel_values": torch.stack(list(pool.map(view, files, keys))), "labels": torch.tensor(labels)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolderData:
    """The images of a run, and the names of their classes by index."""

    classes: tuple[str, ...]
    train: ImageExamples
    held_out: ImageExamples


def load_image_folder(config: ImageFolderConfig, seed: int) -> ImageFolderData:
    """The images that `config` names, listed on rank 0 and sent to every rank; each rank reads its own images.

    Classes and files are in alphabetical order.
    Raises: DataError, on every rank, for folders that are missing, have no images, or differ in their classes.
    Collective: every rank of the default group.
    """
    return from_rank_zero(lambda: _list_folder(config, seed))


def read_image(file: Path) -> Image.Image:
    """The image in RGB. Raises: DataError for a file that is missing, damaged or no image."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # the decoders raise whatever the first wrong byte leads to
        raise DataError(f"{file} cannot be read as an image: {error}. Replace or remove it.") from error


def _list_folder(config: ImageFolderConfig, seed: int) -> ImageFolderData:
    if config.path is None:
        raise DataError("data.path is not set. Set it to the folder that holds train/<class> and val/<class>.")
    parts = {name: _files_by_class(Path(config.path) / name) for name in ("train", "val")}
    classes = tuple(parts["train"])
    if tuple(parts["val"]) != classes:
        differing = sorted(set(classes) ^ set(parts["val"]))
        raise DataError(
            f"The folders train and val in {config.path} must have the same classes, but only one of them has "
            f"{', '.join(differing)}."
        )
    train, held_out = (
        ImageExamples(
            files=tuple(file for files in by_class.values() for file in files),
            labels=tuple(label for label, files in enumerate(by_class.values()) for _ in files),
            size=config.image_size,
            seed=seed,
        )
        for by_class in parts.values()
    )
    return ImageFolderData(classes=classes, train=train, held_out=held_out)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    """The image files of every class, both in alphabetical order. Raises: DataError for no folder or an empty one."""
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder} (seen from {Path.cwd()}). Set data.path to the folder that holds "
            "train/<class> and val/<class>."
        )
    found = {
        entry.name: sorted(file for file in entry.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        for entry in sorted(folder.iterdir())
        if entry.is_dir()
    }
    if not found:
        raise DataError(f"{folder} has no folders of classes. Put the images of each class in a folder of its own.")
    if empty := [name for name, files in found.items() if not files]:
        raise DataError(f"{folder} has no {', '.join(IMAGE_SUFFIXES)} files for {', '.join(empty)}.")
    return found
