"""A picture of what a vision-language model answers to held-out questions, and of the experts that fired for each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynmoe_ds.data import ConversationExamples
from dynmoe_ds.data.chat import IGNORED
from dynmoe_ds.data.image_folder import read_image
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import Routing
from dynmoe_ds.telemetry.drawing import DOTS_PER_INCH, STYLE
from dynmoe_ds.training.saved_run import SavedRun
from dynmoe_ds.training.tasks import VisionLanguage

_COLUMNS, _PANEL_INCHES = 3, (4.4, 1.9)
_RIGHT, _WRONG = "#2a9d5c", "#d9480f"
_MODALITIES = ("#1f77b4", "#b8860b")  # image, text


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A held-out question with the right answer and the model's.

    fired: by layer, the share of the prompt's tokens that chose each of `experts` (ids), [2, E]: image tokens, then
    text tokens; NaN without such tokens.
    """

    question: str
    right: str
    given: str
    images: tuple[Path, ...]
    experts: dict[str, tuple[int, ...]]
    fired: dict[str, np.ndarray]

    @property
    def is_right(self) -> bool:
        return self.given == self.right


def draw_answers(run: SavedRun, file: str | Path, num_answers: int = 12) -> list[Answer]:
    """Write a PNG of the model's answers to `num_answers` held-out questions, equally many of every kind; return them.

    Raises: ConfigError for a run of another task, or a file that cannot be written; DataError for
    data that are not there any more.
    """
    task = run.task
    if not isinstance(task, VisionLanguage):
        raise ConfigError(f"{run.folder} is no run of a vision-language model, so there are no answers to draw.")
    if not Path(file).parent.is_dir():
        raise ConfigError(f"{file} cannot be written: there is no folder {Path(file).parent} (seen from {Path.cwd()}).")
    examples = task.data.held_out
    answers = [_answer(run, task, index) for index in _spread_over_kinds(examples, num_answers)]
    try:
        _draw(answers, Path(file))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.") from error
    return answers


def _spread_over_kinds(examples: ConversationExamples, count: int) -> list[int]:
    """The first examples of every kind in turn."""
    by_kind: dict[str | None, list[int]] = {}
    for index, sample in enumerate(examples.samples):
        by_kind.setdefault(sample.kind, []).append(index)
    turns = [kind[turn] for turn in range(len(examples)) for kind in by_kind.values() if turn < len(kind)]
    return turns[:count]


@torch.no_grad()
def _answer(run: SavedRun, task: VisionLanguage, index: int) -> Answer:
    sample = task.data.held_out.samples[index]
    device = next(run.model.parameters()).device
    batch = task.data.held_out.batch([index], device)
    ids, labels = batch["input_ids"], batch["labels"][0]
    is_learned = labels != IGNORED
    first = int(is_learned.nonzero()[0])
    after = (~is_learned[first:]).nonzero()
    last = first + int(after[0]) if len(after) else len(labels)  # of the first answer
    prompt: dict[str, Any] = {"input_ids": ids[:, :first], "attention_mask": torch.ones_like(ids[:, :first])}
    num_images = int((prompt["input_ids"] == task.backbone.image_token_id).sum()) // task.image.num_tokens
    if num_images:
        prompt["pixel_values"] = batch["pixel_values"][:num_images]
    masks: dict[str, Tensor] = {}
    hooks = [
        layer.router.register_forward_hook(lambda _, __, routing, name=name: _note(masks, name, routing))
        for name, layer in run.layers.items()
    ]
    try:
        run.model(**prompt)
    finally:
        for hook in hooks:
            hook.remove()
    model: Any = run.model
    end = task.tokenizer.eos_token_id
    written = model.generate(
        **prompt, max_new_tokens=last - first, do_sample=False, pad_token_id=end, eos_token_id=end, use_cache=True
    )[0, first:]
    is_image = (ids[0, :first] == task.backbone.image_token_id).cpu()
    fired, experts = {}, {}
    for name, mask in masks.items():
        slots_by_id = run.layers[name].placement.slots_by_id
        experts[name], live = tuple(slots_by_id), mask[:, list(slots_by_id.values())]
        fired[name] = np.array([_shares(live[is_image]), _shares(live[~is_image])])
    decode = task.tokenizer.decode
    text = [token for token in ids[0, :first].tolist() if token != task.backbone.image_token_id]
    return Answer(
        question=" ".join(decode(text, skip_special_tokens=True).split()),
        right=decode(labels[first:last], skip_special_tokens=True).strip(),
        given=decode(written, skip_special_tokens=True).strip(),
        images=sample.images[:num_images],
        experts=experts,
        fired=fired,
    )


def _note(masks: dict[str, Tensor], name: str, routing: Routing) -> None:
    masks[name] = routing.mask.cpu()


def _shares(chosen: Tensor) -> np.ndarray:
    """The share of tokens [E] that chose each expert, of `chosen` [T, E]; NaN without tokens."""
    return chosen.double().mean(0).numpy() if len(chosen) else np.full(chosen.shape[1], np.nan)


def _draw(answers: Sequence[Answer], file: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(answers) // _COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(_COLUMNS * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.6),
            dpi=DOTS_PER_INCH,
            layout="constrained",
            facecolor="white",
        )
        FigureCanvasAgg(figure)
        num_right = sum(answer.is_right for answer in answers)
        figure.suptitle(
            f"{num_right} of {len(answers)} held-out questions answered as they should be. Bars: the share of image "
            "tokens (blue) and text tokens (yellow) that chose each expert, by layer",
            fontsize=11,
        )
        panels = figure.subfigures(rows, _COLUMNS, squeeze=False)
        for panel, answer in zip(panels.flat, answers, strict=False):
            _draw_answer(panel, answer)
        figure.savefig(file, format="png")


def _draw_answer(panel: Any, answer: Answer) -> None:
    verdict = "" if answer.is_right else f" (right: {answer.right})"
    title = textwrap.fill(answer.question, 52)
    panel.suptitle(f"{title}\n{answer.given or '(nothing)'}{verdict}", fontsize=8.5, fontweight="bold",
                   color=_RIGHT if answer.is_right else _WRONG)  # fmt: skip
    picture, *charts = panel.subplots(
        1, 1 + len(answer.fired), squeeze=False, width_ratios=[1.1, *[1.4] * len(answer.fired)]
    )[0]
    picture.axis("off")
    if answer.images:
        picture.imshow(np.array(read_image(answer.images[0])), interpolation="nearest")
    else:
        picture.text(0.5, 0.5, "text alone", ha="center", va="center", fontsize=8, color="0.4")
    for chart, (name, shares) in zip(charts, answer.fired.items(), strict=True):
        places = np.arange(shares.shape[1])
        for offset, values, colour in zip((-0.2, 0.2), shares, _MODALITIES, strict=True):
            chart.bar(places + offset, np.nan_to_num(values), 0.4, color=colour)
        chart.set(ylim=(0, 1.05), yticks=[0, 1])
        chart.set_xticks(places, labels=[f"{expert_id}" for expert_id in answer.experts[name]])
        chart.tick_params(labelsize=6, length=2)
        layer = next((part for part in name.split(".") if part.isdigit()), name)
        chart.set_title(f"layer {layer}", fontsize=7, fontweight="normal")
