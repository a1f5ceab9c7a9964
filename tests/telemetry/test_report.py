from __future__ import annotations

import html
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dynmoe_ds.errors import DataError
from dynmoe_ds.telemetry.drawing import new_figure, smoothed, tokens_above
from dynmoe_ds.telemetry.expert_pictures import MAX_EXPERTS_SHOWN
from dynmoe_ds.telemetry.history import Series, read_history
from dynmoe_ds.telemetry.pictures import draw_pictures, evenly_chosen, short_names
from dynmoe_ds.telemetry.report import write_report
from dynmoe_ds.telemetry.run_folder import RunFolder
from tests.telemetry.events_for_tests import LAYER, event
from tests.telemetry.fake_run import write_fake_run

VOID_TAGS = ("meta", "img")


class Page(HTMLParser):
    """Checks that tags are balanced and gathers the text, the tags and the addresses that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alternatives: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open_tags == [], self.open_tags

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

        self.alternatives += [value or "" for name, value in attrs if name == "alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def report_of(path: Path) -> Page:
    return Page(write_report(path).read_text())


def test_a_whole_run_gives_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run")
    report = write_report(path, write_pictures=True)
    assert report == path / "report.html"
    text = report.read_text()
    page = Page(text)
    assert len(page.addresses) == page.tags.count("img") == page.tags.count("figcaption") == 9
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "@import" not in text
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text
    pictures = {file.name for file in (path / "pictures").iterdir()}
    assert pictures == {
        "loss.png", "live_experts.png", "mean_k.png", "mean_k_by_layer.png", "unrouted_share.png",
        "lives_00.png", "lives_01.png", "load_00.png", "load_01.png",
    }  # fmt: skip
    assert all((path / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def facts(text: str) -> dict[str, str]:
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)
    return {html.unescape(name): html.unescape(value) for name, value in found}


def test_the_headline_facts_are_the_folder_s(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    speed = {"train/tokens_per_second": 1000.0, "train/step_time_s": 0.5}
    folder.append_metrics(10, {"train/loss": 5.0, "moe/mean_k": 1.0, **speed}, time_s=5.0)
    folder.append_metrics(40, {"train/loss": 4.0, "eval/loss": 4.25, "moe/mean_k": 1.75, **speed}, time_s=4000.0)
    grown = [{"expert_id": i, "slot": i, "rank": 0, "parent_id": 0, "seeding": "mean"} for i in (5, 6, 7)]
    folder.append_adaptation(event(20, pruned=[1], grown=grown, live_before=5, live_after=7))
    assert facts(write_report(tmp_path).read_text()) == {
        "optimiser steps": "40",
        "last training loss": "4.000",
        "last held-out loss": "4.250",
        "training tokens seen": "about 20.0k",  # 40 steps of 0.5 s at 1000 tokens per second
        "time": "1 h 6 min",
        "experts per token (mean k), last": "1.75",
        "live experts, first → last": "5 → 7",
        "births / deaths": "3 / 1",
    }
    folder.append_metrics(41, {"train/loss": math.nan, "train/tokens_seen": 123456}, time_s=4001.0)
    found = facts(write_report(tmp_path).read_text())
    assert found["training tokens seen"] == "123.5k"
    assert found["last training loss"] == "not a finite number"


def test_active_parameters_are_among_the_facts_where_they_were_logged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics(10, {"moe/active_parameters": 458_900_000.0}, time_s=5.0)
    folder.append_metrics(20, {"moe/active_parameters": 373_900_000.0}, time_s=9.0)
    assert facts(write_report(tmp_path).read_text())["active parameters per token, last"] == "373.9M"
    folder.append_metrics(30, {"moe/active_parameters": math.nan}, time_s=10.0)
    assert facts(write_report(tmp_path).read_text())["active parameters per token, last"] == "not a finite number"


def test_mean_k_of_modalities_is_among_the_facts_where_it_was_logged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, image in ((10, 1.0), (20, 2.254)):
        values = {"eval/mean_k_per_modality/image": image, "eval/mean_k_per_question/text": 7.0}
        folder.append_metrics(step, values, time_s=float(step))
    found = facts(write_report(tmp_path).read_text())
    assert found["experts per image token, held-out, last"] == "2.25"
    assert not any("7.0" in value or "text token" in name for name, value in found.items())


def run_of_two_layers(path: Path, values: dict[int, tuple[float, float]]) -> Path:
    """A run that logged the mean k of two layers and the tokens seen, 500 a step, by step."""
    folder = RunFolder(path)
    for step, (first, second) in values.items():
        of_layers = {"moe/mean_k/layers.0.mlp": first, "moe/mean_k/layers.2.mlp": second}
        of_layers |= {"moe/live_experts/layers.0.mlp": 4, "moe/live_experts/layers.2.mlp": 4}
        folder.append_metrics(step, {**of_layers, "train/tokens_seen": step * 500}, time_s=step)
    folder.close()
    return path


def test_mean_k_is_drawn_over_steps_and_tokens_seen(tmp_path: Path) -> None:
    run = run_of_two_layers(tmp_path, {10: (4.0, 1.0), 40: (3.0, 2.0)})
    assert "The upper axis counts the training tokens seen." in report_of(run).words
    figure, axes = new_figure(3.0)
    axes.set_xlim(0, 40)
    assert tokens_above(axes, read_history(run)) != ""
    figure.canvas.draw()
    (above,) = axes.child_axes
    assert above.get_xlim() == pytest.approx((0, 20_000))
    assert above.get_xlabel() == "training tokens seen"
    assert "10.0k" in [label.get_text() for label in above.get_xticklabels()]


def test_without_tokens_seen_there_is_one_axis(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", steps=10)
    assert "upper axis" not in report_of(run).words
    _, axes = new_figure(3.0)
    assert tokens_above(axes, read_history(run)) == "" and axes.child_axes == []


def test_mean_k_by_layer_shows_every_layer_at_the_first_and_the_last_log_line(tmp_path: Path) -> None:
    def picture(name: str, values: dict[int, tuple[float, float]]) -> bytes:
        history = read_history(run_of_two_layers(tmp_path / name, values))
        return next(picture.png for picture in draw_pictures(history) if picture.name == "mean_k_by_layer")

    shown = picture("a", {1: (4.0, 1.0), 2: (3.0, 2.0), 3: (3.0, 1.5)})
    assert picture("middle", {1: (4.0, 1.0), 2: (9.0, 9.0), 3: (3.0, 1.5)}) == shown
    assert picture("first", {1: (4.0, 2.0), 2: (3.0, 2.0), 3: (3.0, 1.5)}) != shown
    assert picture("last", {1: (4.0, 1.0), 2: (3.0, 2.0), 3: (3.5, 1.5)}) != shown


def test_the_lives_are_those_of_the_events(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics(100, {"train/loss": 1.0}, time_s=1.0)
    folder.append_experts(30, {LAYER: {"load": {"0": 10, "1": 30}, "num_tokens": 40, "num_unrouted": 4}})
    folder.append_experts(60, {LAYER: {"load": {"0": 50, "1": 30}, "num_tokens": 100, "num_unrouted": 0}})
    grown = [{"expert_id": 2, "slot": 2, "rank": 0, "parent_id": 0, "seeding": "copy_nearest"}]
    both = {"tokens_per_expert": {"0": 1, "1": 0}, "live_before": 2, "live_after": 2}
    folder.append_adaptation(event(30, pruned=[1], grown=grown, **both))
    folder.append_adaptation(event(60, pruned=[2], grown=[], live_before=2, live_after=1, tokens_per_expert={"0": 1}))
    history = read_history(tmp_path)
    (layer,) = history.layers
    assert [(life.expert_id, life.born, life.died, life.is_initial, life.parent_id) for life in layer.lives] == [
        (0, 0, None, True, None),
        (1, 0, 30, True, None),
        (2, 30, 60, False, 0),
    ]
    assert layer.live == Series(steps=[0, 30, 60, 100], values=[2.0, 2.0, 1.0, 1.0])
    assert layer.births == [(30, 1)] and layer.deaths == [(30, 1), (60, 1)]
    assert layer.mean_k == Series(steps=[30, 60], values=[1.0, 0.8])  # 40 of 40 and 80 of 100
    assert layer.unrouted_share == Series(steps=[30, 60], values=[0.1, 0.0])
    assert [(line.from_step, line.to_step) for line in layer.loads] == [(0, 30), (30, 60)]
    assert history.last_step == 100


def test_loads_come_from_the_windows_where_no_other_are_recorded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (60, 120):
        folder.append_adaptation(event(step))  # windows of 30 steps: gaps between them
    (layer,) = read_history(tmp_path).layers
    assert [(line.from_step, line.to_step) for line in layer.loads] == [(30, 60), (90, 120)]
    assert layer.loads[0].tokens_per_expert == {0: 812, 1: 0, 2: 700, 3: 650, 9: 5}
    assert report_of(tmp_path).tags.count("img") == 3


def test_events_are_told_in_words_and_everything_is_escaped(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "<i>run", steps=60)
    folder = RunFolder(path)
    evil = event(60, out_of_slots=True, warnings=("<script>alert(1)</script>",))
    evil["layers"] = {"<b>$x_$&": evil["layers"][LAYER]}
    folder.append_adaptation(evil)
    (path / "config.yaml").write_text("prompt: </details><script>1</script>\n")
    (path / "sample.txt").write_text("</pre><script>2</script> \x00 &amp;")
    page = report_of(path)
    assert "script" not in page.tags and "b" not in page.tags and "i" not in page.tags
    for words in (
        "grew expert 4 (copy_nearest of 2), pruned 1 -> 5 live of 16 slots",
        "is out of slots: 5 of 16 are live",
        "warning: <script>alert(1)</script>",
        "</pre><script>2</script>",
        "</details><script>1</script>",
    ):
        assert words in page.words
    assert "Load of the experts of <b>$x_$&" in page.alternatives
    assert "details" in page.tags


def test_no_events_one_log_line_and_no_evaluation(tmp_path: Path) -> None:
    page = report_of(write_fake_run(tmp_path / "a", steps=5, adapt_every=0, eval_every=0))
    assert "No adaptation took place in this run." in page.words
    assert "not recorded" in page.words
    assert page.tags.count("img") == 9


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_a_run_that_logged_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path).close()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    page = report_of(tmp_path)
    assert "Nothing has been logged yet" in page.words and "seed: 0" in page.words
    assert page.tags.count("img") == 0 and "h2" not in page.tags and "not recorded" not in page.words


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_a_run_without_expert_layers_and_one_that_diverged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    speed = {"train/tokens_per_second": math.nan, "train/step_time_s": 1.0}
    folder.append_metrics(1, {"train/loss": math.nan, **speed}, time_s=0.0)
    page = report_of(tmp_path)
    assert page.tags.count("img") == 1
    folder.append_metrics(2, {"moe/live_experts/a": math.nan, "moe/mean_k": math.nan}, time_s=0.0)
    page = report_of(tmp_path)
    assert page.tags.count("img") == 3
    assert "nan" not in page.words.split("Configuration")[0]
    assert "not a finite number" in page.words


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_dozens_of_layers_are_capped_and_said_to_be(tmp_path: Path) -> None:
    page = report_of(write_fake_run(tmp_path / "run", steps=60, num_layers=24))
    assert page.tags.count("img") == 5 + 2 * 8
    assert "8 of the 24 layers are shown, evenly spread over the depth" in page.words
    assert page.words.count("model.layers.45.mlp") >= 1  # not drawn, but in the table


def test_thousands_of_lines_and_of_experts_are_fast_and_capped(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", steps=4000, log_every=1, adapt_every=2, num_layers=2, num_slots=110)
    started = time.monotonic()
    text = write_report(path).read_text()
    assert time.monotonic() - started < 60
    words = Page(text).words
    assert "4000 recordings are merged into 200 columns" in words
    assert f"the {MAX_EXPERTS_SHOWN} that lived longest are shown" in words
    assert "The first 1000 of" in words and "adaptation.jsonl has all of them" in words
    assert "too many to mark here" in words
    assert len(text) < 3_000_000


def test_a_folder_that_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no metrics\.jsonl. Give the folder that `dynmoe train` wrote"):
        write_report(tmp_path)


def test_a_broken_line_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: no integer `step`"):
        write_report(tmp_path)


def test_evenly_chosen_keeps_first_and_last(tmp_path: Path) -> None:
    layers = read_history(write_fake_run(tmp_path / "run", steps=5, num_layers=20)).layers
    chosen = evenly_chosen(layers, 8)
    assert len(chosen) == 8 and chosen[0] is layers[0] and chosen[-1] is layers[-1]
    assert len({layer.name for layer in chosen}) == 8
    assert evenly_chosen(layers[:3], 8) == layers[:3]


def test_short_names() -> None:
    assert short_names(["model.layers.1.mlp", "model.layers.13.mlp"]) == {
        "model.layers.1.mlp": "layer 1",
        "model.layers.13.mlp": "layer 13",
    }
    for names in (["a"], ["a.1", "b.1"], ["a.1.2", "a.2.1"], ["a.1", "a.1.b"], ["a", "b"]):
        assert short_names(names) == {name: name for name in names}


def test_smoothing_against_a_plain_loop() -> None:
    values = [9.0, 1.0, math.nan, 4.0, 6.0, 2.0, math.nan]
    expected = [9.0, 5.0, 11 / 3, 13 / 4, 4.0, 4.0, math.nan]  # reach 0, 1, 2, 2, 2, 1, 0
    expected[1] = (9.0 + 1.0) / 2
    expected[2] = (9 + 1 + 4 + 6) / 4
    expected[3] = (1 + 4 + 6 + 2) / 4
    expected[4] = (4 + 6 + 2) / 3
    result = smoothed(Series(steps=list(range(7)), values=values), half_width=2)
    assert result.values == pytest.approx(expected, nan_ok=True)
