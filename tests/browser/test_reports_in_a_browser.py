"""The pages of `dynmoe report` in a browser: nothing is missing, too wide or broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynmoe_ds.cli.main import main
from tests.browser.chromium import Chromium
from tests.telemetry.fake_run import write_fake_run
from tests.telemetry.fake_sweep import write_fake_sweep

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run, of two that are compared, and of a sweep."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_fake_run(folder / "dynamic", steps=60, adapt_every=5, exact_match={"": 0.5, "which": 0.75})
    # Names without a place to break a line at are the widest.
    other = write_fake_run(folder / "a_second_run_with_a_name_that_is_rather_long", steps=60, num_layers=24)
    (other / "config.yaml").write_text(
        "seed: 1\nmodel:\n  path: /some/folder/that/is/deep/and/has/no/space/in/its/name\n"
    )
    sweep = write_fake_sweep(folder / "sweep")
    assert main(["report", f"{one}"]) == 0
    assert main(["report", f"{one}", f"{other}"]) == 0
    assert main(["report", f"{sweep}"]) == 0
    return {name: path / "report.html" for name, path in (("run", one), ("comparison", folder), ("sweep", sweep))}


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["run", "comparison", "sweep"])
def test_everything_is_there_and_nothing_too_wide(
    name: str, width: int, chromium: Chromium, pages: dict[str, Path]
) -> None:
    chromium.open(pages[name], width=width)
    assert chromium.complaints() == []
    assert chromium.run("innerWidth") == width and chromium.run("document.images.length") >= 4
    assert chromium.run("[...document.images].filter(image => !image.complete || !image.naturalWidth).length") == 0
    assert chromium.run("document.documentElement.scrollWidth") <= width
    # What cannot be read in a line scrolls by itself; headings of tables break between words alone.
    wider = "[...document.querySelectorAll('main *')].filter(one => one.getBoundingClientRect().right > innerWidth)"
    assert chromium.run(f"{wider}.filter(one => !one.closest('.wide, .scroll')).map(one => one.outerHTML)") == []
    assert chromium.run("Math.min(...[...document.images].map(image => image.clientWidth))") >= 500


def test_links_lead_to_the_runs_own_reports(chromium: Chromium, pages: dict[str, Path]) -> None:
    chromium.open(pages["comparison"])
    links = chromium.run("[...document.links].map(link => link.href)")
    assert len(links) == 1  # the other run has none yet
    chromium.run("document.links[0].click()")
    chromium.wait_for("Run dynamic")


def test_the_dark_page_is_dark(chromium: Chromium, pages: dict[str, Path]) -> None:
    def brightness(what: str) -> float:
        colour = chromium.run(f"getComputedStyle(document.body).{what}.match(/[0-9]+/g).slice(0, 3).map(Number)")
        return float(sum(colour)) / 3

    for is_dark in (False, True):
        chromium.open(pages["run"], is_dark=is_dark)
        ground, ink = brightness("backgroundColor"), brightness("color")
        assert (ink > ground + 150) if is_dark else (ground > ink + 150)
