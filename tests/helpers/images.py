"""An image folder in miniature: two classes of plain colour with noise, which a model can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 40, 200), "red": (200, 40, 40)}


def write_images(folder: Path, num_train: int = 4, num_held_out: int = 3) -> None:
    """`train` and `val` with `num_train` and `num_held_out` images of each class, PNG and JPEG, of several heights."""
    rng = np.random.default_rng(0)
    for part, number in (("train", num_train), ("val", num_held_out)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(number):
                noise = rng.integers(-30, 30, (20 + 3 * index, 26, 3))
                image = Image.fromarray((np.array(colour) + noise).astype(np.uint8))
                image.save(folder / part / name / f"{index:03d}.{'png' if index % 2 else 'jpg'}")
