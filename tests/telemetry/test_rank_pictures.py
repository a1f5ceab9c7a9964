"""The pictures of the ranks that share the experts: which number is drawn where, and what is told of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dynmoe_ds.telemetry import rank_pictures
from dynmoe_ds.telemetry.comparison import write_comparison
from dynmoe_ds.telemetry.history import read_history
from dynmoe_ds.telemetry.pictures import draw_pictures, short_names
from dynmoe_ds.telemetry.rank_pictures import draw_ranks, sent_bytes_per_token
from dynmoe_ds.telemetry.report import write_report
from dynmoe_ds.telemetry.run_folder import RunFolder
from tests.telemetry.drawn_axes import catch_axes, lines_of, rows_of
from tests.telemetry.fake_run import write_fake_run
from tests.telemetry.test_comparison import rows
from tests.telemetry.test_report import facts

LAYERS = ("layers.0.mlp", "layers.2.mlp")
BETWEEN = "bytes between ranks per token, last"


def run(path: Path, rows_by_step: dict[int, tuple[tuple[int, ...], ...]], **values: float) -> Path:
    """A run in which the ranks had these rows in each of the first layers."""
    folder = RunFolder(path)
    for step, of_layers in rows_by_step.items():
        folder.append_metrics(step, {"train/loss": 3.0, **values}, time_s=step)
        entries = {}
        for layer, of_ranks in zip(LAYERS, of_layers, strict=False):
            entries[layer] = {"load": {0: sum(of_ranks)}, "num_tokens": 16, "num_unrouted": 0}
            entries[layer] |= {"rows_per_rank": of_ranks} if of_ranks else {}
        folder.append_experts(step, entries)
    folder.close()
    return path


@pytest.mark.parametrize("num_layers", [1, 2])
def test_imbalance_is_drawn_over_steps(num_layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    for step, overall, of_layers in ((10, 1.25, (1.5, 1.0)), (20, 1.5, (1.125, 2.0))):
        values = {"moe/rank_imbalance": overall}
        for layer, imbalance in list(zip(LAYERS, of_layers, strict=True))[:num_layers]:
            values |= {f"moe/live_experts/{layer}": 4.0, f"moe/rank_imbalance/{layer}": imbalance}
        folder.append_metrics(step, values, time_s=step)
    folder.close()
    caught = catch_axes(monkeypatch, rank_pictures)
    assert [picture.name for picture in draw_pictures(read_history(tmp_path))] == ["live_experts", "rank_imbalance"]
    wanted = {
        "layer 0": [(10, 1.5), (20, 1.125)],
        "layer 2": [(10, 1.0), (20, 2.0)],
        "all layers": [(10, 1.25), (20, 1.5)],
    }
    if num_layers == 1:  # of which the line of all would be the same
        wanted = {LAYERS[0]: wanted["layer 0"]}
    assert lines_of(caught["rank_imbalance"]) == wanted
    assert caught["rank_imbalance"].get_ylim()[0] == 1


def test_which_rank_has_more_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run(tmp_path / "run", {10: ((9, 7), (9, 3)), 20: ((4, 4), (0, 8))})
    caught = catch_axes(monkeypatch, rank_pictures)
    captions = {picture.name: picture.caption for picture in draw_pictures(read_history(path))}
    axes = caught["rank_loads"]
    assert rows_of(axes, 0) == [[18 / 14, 4 / 8], [10 / 14, 12 / 8]], "all layers"
    assert rows_of(axes, 1) == [[9 / 8, 1], [7 / 8, 1]]
    assert rows_of(axes, 2) == [[9 / 6, 0], [3 / 6, 2]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("all layers, rank 0", "rank 1"),
        *("layer 0, rank 0", "rank 1"),
        *("layer 2, rank 0", "rank 1"),
    ]
    corners = [mesh.get_coordinates() for mesh in axes.collections[:3]]  # type: ignore[attr-defined]
    assert [corner[0, :, 0].tolist() for corner in corners] == [[0, 10, 20]] * 3
    assert [corner[:, 0, 1].tolist() for corner in corners] == [[-0.5, 0.5, 1.5], [1.5, 2.5, 3.5], [3.5, 4.5, 5.5]]
    assert axes.get_ylim() == (5.5, -0.5)
    assert "nothing was recorded" not in captions["rank_loads"]


@pytest.mark.parametrize(
    ("rows", "limits"), [((6, 2, 1), (0, 2)), ((8, 5, 5), (2 / 3, 4 / 3)), ((9, 9, 9), (0.9, 1.1))]
)
def test_an_equal_share_is_in_the_middle_of_the_colours(
    rows: tuple[int, ...], limits: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = read_history(run(tmp_path, {10: (rows,)}))
    caught = catch_axes(monkeypatch, rank_pictures)
    assert {picture.name for picture in draw_pictures(history)} >= {"rank_loads"}
    assert caught["rank_loads"].collections[0].get_clim() == pytest.approx(limits)


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_ranks_of_one_layer_and_of_none(tmp_path: Path) -> None:
    def captions(name: str, rows_by_step: dict[int, tuple[tuple[int, ...], ...]]) -> dict[str, str]:
        history = read_history(run(tmp_path / name, rows_by_step))
        names = {layer.name: layer.name for layer in history.layers}
        return {picture.name: picture.caption for picture in draw_ranks(history, history.layers, names, "")}

    goes_on_alone = captions("one", {10: ((8, 8),), 20: ((),)})
    assert goes_on_alone["rank_loads"].endswith("Grey: nothing was recorded.")
    assert captions("alone", {10: ((), ())}) == {}


def test_of_many_ranks_every_third_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times 32 rows, of which at most 40 can be told apart."""
    history = read_history(run(tmp_path, {10: ((1,) * 32, (2,) * 32)}))
    caught = catch_axes(monkeypatch, rank_pictures)
    list(draw_ranks(history, history.layers, short_names(LAYERS), ""))
    labels = [label.get_text() for label in caught["rank_loads"].get_yticklabels()]
    assert len(labels) == 30 and labels[9:12] == ["rank 27", "layer 0, rank 0", "rank 3"]
    assert caught["rank_loads"].get_yticks()[10:12].tolist() == [32, 35]


def test_bytes_between_ranks_are_drawn_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    for step, sent in ((10, (2000.0, 1500.0, 50.0)), (20, (16000.0, 12000.0, 600.0))):
        kinds = ("sent_row", "least_row", "sent_metadata")
        values = {f"moe/{kind}_bytes_per_token": value for kind, value in zip(kinds, sent, strict=True)}
        folder.append_metrics(step, values, time_s=step)
    history = read_history(tmp_path / "run")
    caught = catch_axes(monkeypatch, rank_pictures)
    assert [picture.name for picture in draw_pictures(history)] == ["sent_bytes"]
    assert lines_of(caught["sent_bytes"]) == {
        "rows": [(10, 2000), (20, 16000)],
        "fewest rows possible": [(10, 1500), (20, 12000)],
        "counts, slots, weights": [(10, 50), (20, 600)],
    }
    assert sent_bytes_per_token(history) == 16600
    monkeypatch.undo()
    assert facts(write_report(tmp_path / "run").read_text())[BETWEEN] == "16.6k"
    alone = write_fake_run(tmp_path / "alone", steps=20)
    found = rows(write_comparison([tmp_path / "run", alone], tmp_path / "both.html").read_text())
    column = found[0].index("bytes/token between ranks")
    assert [row[column] for row in found[1:3]] == ["16.6k", "–"]
    folder.append_metrics(30, dict.fromkeys(values, math.nan), time_s=30)
    assert sent_bytes_per_token(read_history(tmp_path / "run")) is None
    assert BETWEEN not in facts(write_report(tmp_path / "run").read_text())
