"""The layer's comparison as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.layer.candidates import DENSE, PADDED, TOP_ANY, TOP_K
from benchmarks.side_by_side import table, write_page

BOTH = "forward + backward"

EXPLANATION = (
    "Times are minima over rounds in which all candidates take turns, with the greatest in brackets; ratios are to the "
    "dense FFN of width k x F, which has the FLOPs of k experts. Each of ours is timed with its auxiliary losses and "
    "records, as in training. Memory is the peak of what forward and backward allocate beyond parameters and input, as "
    "torch's allocator sees it; the gradients of parameters are part of it and are told once more, since a layer has "
    "those of all its experts. `busiest` is the load of the busiest expert over the mean. `off` is how far output and "
    "gradient of x are from those of our layer with the same router, relative to the greatest entry, in float32. Peers "
    "with a top-k router have its loads; DeepSpeed's dropping layer leaves out what exceeds the mean load, and so does "
    "less work under skew."
)


def write_report(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write layer.json, layer.md and layer.png into `folder`; give their paths."""
    paths = write_page(folder, "layer", "The layer beside its peers", found, _lines(found["cells"]))
    picture = folder / "layer.png"
    draw(found["cells"], picture)
    return [*paths, picture]


def ratio(cell: Mapping[str, Any], name: str, what: str) -> float:
    """How many times the dense FFN's: of `forward`, `forward + backward` or `peak_bytes`."""

    def value(of: str) -> float:
        row = cell["candidates"][of]
        return row[what] if what in row else row["seconds"][what]["least"]

    return value(name) / value(DENSE)


def names_of(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """All candidates, in their order."""
    return list(dict.fromkeys(name for cell in cells for name in cell["candidates"]))


def _lines(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield EXPLANATION
    yield from ("", "## Targets", "")
    yield from target_lines(cells)
    for what, title in ((BOTH, "Forward and backward"), ("peak_bytes", "Peak memory")):
        yield from ("", f"## {title}, times that of the dense FFN", "")
        yield from table(
            ["", *(cell["label"] for cell in cells)],
            [
                [name, *(f"{ratio(cell, name, what):.2f}" if name in cell["candidates"] else "–" for cell in cells)]
                for name in names_of(cells)
            ],
        )
    for cell in cells:
        yield from ("", f"## {cell['label']}", "")
        header = ["", "mean k", "busiest", "dropped", "forward, ms", "ratio", f"{BOTH}, ms", "ratio", "peak, MB",
                  "ratio", "of it gradients, MB", "off"]  # fmt: skip
        yield from table(header, [_row(cell, name) for name in cell["candidates"]])
        for name, reason in cell["left_out"].items():
            yield from ("", f"{name} is not there: {reason}")


def target_lines(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How many cells meet each target that this project set itself, and all comparisons that are lost."""
    rows = [
        ["at most 1.05 times the dense FFN", name, what, _met(ratio(cell, name, what) <= 1.05 for cell in cells)]
        for name in (TOP_K, TOP_ANY)
        for what in ("forward", BOTH)
    ]
    lost = []
    padded = [cell for cell in cells if PADDED in cell["candidates"]]
    for what in ("forward", BOTH) if padded else ():
        gains = [ratio(cell, PADDED, what) / ratio(cell, TOP_ANY, what) for cell in padded]
        rows.append([f"at least 3 times as fast as {PADDED}", TOP_ANY, what, _met(gain >= 3 for gain in gains)])
        lost += [
            f"{cell['label']}, {what}: {TOP_ANY} {gain:.2f} times as fast as {PADDED}"
            for cell, gain in zip(padded, gains, strict=True)
            if gain < 3
        ]
    # Peers have a top-k router: only ours with one does the same work.
    pairs = [
        (cell, name) for cell in cells for name in cell["candidates"] if not name.startswith(("ours", DENSE, PADDED))
    ]
    for what in ("forward", BOTH) if pairs else ():
        gains = [ratio(cell, name, what) / ratio(cell, TOP_K, what) for cell, name in pairs]
        rows.append(["faster than a peer at equal k", TOP_K, what, _met(gain > 1 for gain in gains)])
        lost += [
            f"{cell['label']}, {what}: {name} {ratio(cell, name, what):.2f}, {TOP_K} {ratio(cell, TOP_K, what):.2f}"
            for (cell, name), gain in zip(pairs, gains, strict=True)
            if gain <= 1
        ]
    yield from table(["target", "layer", "of", "met"], rows)
    if lost:
        yield from ("", "Comparisons that are missed (those with the dense FFN are in the next table):", "")
        yield from (f"- {line}" for line in lost)


def _met(found: Iterable[bool]) -> str:
    every = list(found)
    return f"{sum(every)} of {len(every)}"


def _row(cell: Mapping[str, Any], name: str) -> list[str]:
    row = cell["candidates"][name]
    has_experts = row["mean_k"] is not None
    found = [
        name,
        f"{row['mean_k']:.2f}" if has_experts else "",
        f"{row['busiest']:.2f}" if has_experts else "",
        f"{100 * row['dropped']:.1f} %" if row["dropped"] else "",
    ]
    for what in ("forward", BOTH):
        seconds = row["seconds"][what]
        found += [f"{1e3 * seconds['least']:.1f} ({1e3 * seconds['most']:.1f})", f"{ratio(cell, name, what):.2f}"]
    found += [f"{row['peak_bytes'] / 1e6:.1f}", f"{ratio(cell, name, 'peak_bytes'):.2f}"]
    return [
        *found,
        f"{row['gradient_bytes'] / 1e6:.1f}",
        "" if row["deviation"] is None else f"{row['deviation']:.0e}",
    ]


def draw(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two grids of candidates x cells: time and memory as multiples of the dense FFN's, in numbers and colours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    names = [name for name in names_of(cells) if name != DENSE]
    width = 3.0 + 0.85 * len(cells)
    figure, axes = plt.subplots(2, 1, figsize=(max(width, 8.0), 2.4 + 0.62 * len(names)), layout="constrained")
    labels = [
        f"E {cell['num_experts']}\nk {cell['k']}\n{cell['routing']}\n{cell['dtype'].replace('bfloat', 'bf')}"
        for cell in cells
    ]
    titles = {BOTH: "Time of forward + backward", "peak_bytes": "Peak memory of forward + backward"}
    for axis, (what, title) in zip(axes, titles.items(), strict=True):
        values = [
            [ratio(cell, name, what) if name in cell["candidates"] else float("nan") for cell in cells]
            for name in names
        ]
        image = axis.imshow(values, norm=LogNorm(1 / 8, 8), cmap="RdBu_r", aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                is_dark = value == value and not 1 / 4 < value < 4
                text = "–" if value != value else f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
        axis.set_xticks(range(len(cells)), labels, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(length=0)
        axis.set_title(f"{title}, times that of a dense FFN of equal FLOPs", fontsize=10)
        bar = figure.colorbar(image, ax=axis, pad=0.01, ticks=[1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8])
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1 (dense)", "2", "4", "8"], fontsize=8)
        bar.ax.minorticks_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)
