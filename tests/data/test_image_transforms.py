import numpy as np
import pytest
import torch
from PIL import Image

from dynmoe_ds.data.image_transforms import (
    AREA_SHARES,
    ASPECT_RATIOS,
    MEAN,
    STD,
    evaluation_view,
    normalised,
    random_box,
    training_view,
)


def _ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, from 0 to 255."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=2).astype(np.uint8))


def test_pixels_are_normalised_per_channel():
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 51))
    values = normalised(image)
    assert values.shape == (3, 1, 2) and values.dtype == torch.float32
    want = [(level - mean) / std for level, mean, std in zip((1.0, 0.0, 0.2), MEAN, STD, strict=True)]
    assert values[:, 0, 0].tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("width", "height"), [(320, 160), (160, 320), (64, 64), (20, 31)])
def test_evaluation_keeps_the_centre_of_the_resized_image(width, height):
    """DeiT: the shorter side becomes 256 for 224, and 224 of it are kept: 7/8 of the shorter side, as much of both."""
    size, shorter = 28, min(width, height)
    view = evaluation_view(_ramp(width, height), size)
    assert view.size == (size, size)
    pixels = np.asarray(view).astype(float)
    for channel, side, line in ((0, width, pixels[size // 2]), (1, height, pixels[:, size // 2])):
        share = 7 / 8 * shorter / side
        want = (0.5 + share * (np.linspace(0, size - 1, size) + 0.5 - size / 2) / size) * 255
        assert np.abs(line[:, channel] - want).max() < 0.5 / size * share * 255 + 5, "within half a pixel, and rounding"


def test_random_boxes_have_the_areas_and_ratios_of_deit():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(400, 300, rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
    width, height = right - left, bottom - top
    shares, ratios = width * height / (400 * 300), width / height
    assert AREA_SHARES[0] - 0.005 < shares.min() < 0.1 and 0.9 < shares.max() <= 1
    assert ASPECT_RATIOS[0] - 0.02 < ratios.min() and ratios.max() < ASPECT_RATIOS[1] + 0.02
    # The means of torchvision 0.29.2's RandomResizedCrop.get_params over 20,000 draws: h, w, top, left.
    means = height.mean(), width.mean(), top.mean(), left.mean()
    assert means == pytest.approx((216.6, 226.1, 41.4, 87.2), rel=0.04)


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))], ids=["wide", "tall"]
)
def test_an_image_that_no_ratio_fits_gives_its_centre(size, box):
    class LargestAreas(np.random.Generator):
        """Draws 100 % of the area, which no box within the ratios has here."""

        def uniform(self, low: float, high: float) -> float:
            return high

    assert random_box(*size, LargestAreas(np.random.PCG64(0))) == box


def test_half_of_the_training_views_are_mirrored():
    rng = np.random.default_rng(1)
    rising = 0
    for _ in range(200):
        view = training_view(_ramp(40, 40), 8, rng)
        assert view.size == (8, 8)
        row = np.asarray(view)[4, :, 0].astype(int)
        rising += row[-1] > row[0]
    assert 70 < rising < 130  # 4 standard deviations are 28
