"""What every web page of this package is made of. A page is one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynmoe_ds.telemetry.drawing import Picture
from dynmoe_ds.telemetry.run_folder import ANSWERS_FILE

STYLE_SHEET = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --line: #d8dce2;
        --ground: #ffffff; --card: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a0a7b4; --line: #3a3f47; --ground: #16181b; --card: #212429; }
  figure img { filter: brightness(0.9); }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
       max-width: 63rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.soft, figcaption { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem; padding: 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.facts dt { color: var(--soft); font-size: .85rem; } .facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.state { border-left: .3rem solid var(--line); background: var(--card); padding: .5rem .9rem; }
.state.running, .state.finished { border-color: #2a9d5c; } .state.failed { border-color: #c92a2a; }
.state.silent, .state.stopped { border-color: #d9480f; }
#look { position: fixed; right: 0; bottom: 0; margin: 0; padding: .2rem .7rem; font-size: .85rem;
        background: var(--card); border: 1px solid var(--line); border-radius: .5rem 0 0 0; }
figure { margin: 1.5rem 0; }
figure img { display: block; max-width: calc(max(100%, 36rem) - 1rem - 2px); height: auto; padding: .5rem;
             background: #fff; border-radius: .5rem; border: 1px solid var(--line); }
figcaption { margin-top: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td:first-child { white-space: nowrap; }
.number { text-align: right; } td.number { white-space: nowrap; }
.scroll { max-height: 32rem; overflow-y: auto; border: 1px solid var(--line); border-radius: .5rem; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow: auto; white-space: pre-wrap; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
"""


def page(title: str, sections: Iterable[str], after: str = "") -> str:
    """A whole page; empty sections are left out. after: what follows `<main>`, which holds title and sections."""
    title = html.escape(title)
    body = "\n".join(section for section in (f"<h1>{title}</h1>", *sections) if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE_SHEET}</style></head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{after}</body></html>\n"
    )


def figure(picture: Picture) -> str:
    """A picture with its caption. Its size is said, so that a page does not jump when a browser has decoded it."""
    encoded = base64.b64encode(picture.png).decode()
    return (
        f'<figure><div class="wide"><img alt="{html.escape(picture.title)}"{_size(picture.png)} '
        f'src="data:image/png;base64,{encoded}"></div>\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _size(png: bytes) -> str:
    """Width and height in pixels, from the chunk with which every PNG begins; nothing for one that is cut off."""
    if len(png) < 24:
        return ""
    width, height = struct.unpack(">II", png[16:24])
    return f' width="{width}" height="{height}"'


def answers(run_dir: Path, title: str) -> str:
    """The picture that `dynmoe evaluate --answers` left in a run folder, if it is there."""
    file = run_dir / ANSWERS_FILE
    if not file.exists():
        return ""
    caption = (
        "Held-out pictures with a question and the model's answer each, and beside them the share of image tokens and "
        "of text tokens that chose each expert."
    )
    drawn = figure(Picture(name=file.stem, title=title, caption=caption, png=file.read_bytes()))
    return f"<h2>{html.escape(title)}</h2>{drawn}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int | None) -> str:
    """A table, which scrolls by itself where it is too wide; columns from `numbers_from` on are set to the right."""

    def row_of(tag: str, cells: Sequence[Any]) -> str:
        right = len(cells) if numbers_from is None else numbers_from
        return "".join(
            f"<{tag}{' class=number' if column >= right else ''}>{html.escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{row_of('td', row)}</tr>" for row in rows)
    head_row = row_of("th", head)
    return f'<div class="wide"><table><thead><tr>{head_row}</tr></thead><tbody>{body}</tbody></table></div>'
