"""What a module draws, before it becomes an image."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from dynmoe_ds.telemetry.drawing import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def catch_axes(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> dict[str, Axes]:
    """The axes of every picture that `module` draws from now on, by the picture's name."""
    caught: dict[str, Axes] = {}

    def finished(name: str, title: str, caption: str, figure: Figure, axes: Axes) -> Picture:
        caught[name] = axes
        return Picture(name=name, title=title, caption=caption, png=b"")

    monkeypatch.setattr(module, "finished", finished)
    return caught


def rows_of(axes: Axes, number: int = 0) -> list[list[float]]:
    """The numbers of a heat map of these axes, row by row; a masked one is NaN."""
    return axes.collections[number].get_array().filled(float("nan")).tolist()  # type: ignore[union-attr, no-any-return]


def lines_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of every line of these axes, by its label."""
    return {f"{line.get_label()}": list(map(tuple, line.get_xydata())) for line in axes.lines}  # type: ignore[arg-type]


def bands_of(axes: Axes) -> dict[str, list[tuple[float, float, float]]]:
    """Where every filled band of these axes is, by its label: (x, lower edge, upper edge) from left to right."""
    bands = {}
    for band in axes.collections:
        edges: dict[float, list[float]] = {}
        for x, y in band.get_paths()[0].vertices.tolist():  # type: ignore[union-attr]
            edges.setdefault(x, []).append(y)
        bands[f"{band.get_label()}"] = [(x, min(ys), max(ys)) for x, ys in sorted(edges.items())]
    return bands
