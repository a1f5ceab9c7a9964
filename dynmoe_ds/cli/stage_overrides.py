"""The overrides of `dynmoe stages`: which are of all stages, and which of one alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynmoe_ds.errors import ConfigError

DEFAULT_STAGES = "projector,language,experts"
NAMES, STAGE, _RUN_DIR = "stages=", "stage=", "run_dir="
_MARK = re.compile(r"\w+:")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOverrides:
    """What `dynmoe train` is given for each stage, `stage=NAME` included, its folder and its start not.

    faults: of stages that are named twice, and of overrides that cannot be of one stage or are of none.
    """

    by_stage: Mapping[str, list[str]]
    faults: Sequence[str]


def are_of_stages(overrides: Sequence[str]) -> bool:
    """Whether they name stages, or something is of one stage alone, so that `dynmoe train` could not read them."""
    return any(text.startswith(NAMES) or _MARK.match(text) for text in overrides)


def overrides_by_stage(overrides: Sequence[str]) -> StageOverrides:
    """The overrides of `dynmoe stages` by stage, in the stages' order.

    `NAME:` before one makes it one of that stage alone; those of adaptation are for stages with experts.
    """
    names = (value_of(overrides, NAMES) or DEFAULT_STAGES).split(",")
    general = [text for text in overrides if not text.startswith((NAMES, _RUN_DIR))]
    marks = {name: f"{name}:" for name in names}
    of_stages = {
        name: [text.removeprefix(mark) for text in general if text.startswith(mark)] for name, mark in marks.items()
    }
    general = [text for text in general if not text.startswith(tuple(marks.values()))]
    of_none = [text for text in general if text.startswith(STAGE) or _MARK.match(text)]
    general = [text for text in general if text not in of_none]
    reserved = [text for own in of_stages.values() for text in own if text.startswith((STAGE, _RUN_DIR))]
    faults = [f"stages names {name} twice. Name every stage once." for name in marks if names.count(name) > 1]
    faults += [f"{text} cannot be of one stage: `dynmoe stages` sets it. Leave it out." for text in reserved]
    for text in of_none:
        if text.startswith(STAGE):
            faults.append(
                f"{text}: `dynmoe stages` trains {', '.join(marks)}. Use stages=NAMES, or `dynmoe train {text}`."
            )
        else:
            faults.append(f"{text} is for a stage that is not trained. The stages are {', '.join(marks)}.")
    return StageOverrides(
        by_stage={name: [*_without_adaptation(name, general, of_stages[name]), f"{STAGE}{name}"] for name in marks},
        faults=faults,
    )


def stage_folders(overrides: Sequence[str], by_stage: Mapping[str, list[str]]) -> dict[str, Path]:
    """The run folder of each stage. Raises: ConfigError if none is given and the first stage's cannot be composed."""
    from dynmoe_ds.config.load import load_sections

    first = next(iter(by_stage.values()))
    base = Path(value_of(overrides, _RUN_DIR) or load_sections(first).sections["run_dir"])
    return {name: base / f"{number}_{name}" for number, name in enumerate(by_stage, 1)}


def value_of(overrides: Sequence[str], key: str) -> str | None:
    """What is given last for `key`, which ends with an equals sign."""
    return next((text.removeprefix(key) for text in reversed(overrides) if text.startswith(key)), None)


def _without_adaptation(stage: str, general: Sequence[str], own: Sequence[str]) -> list[str]:
    """A stage's overrides, its `own` after the `general` ones, less those of experts that a stage without has not."""
    from dynmoe_ds.config.load import load_sections

    others = [*(text for text in general if not text.startswith(("adaptation.", "adaptation="))), *own]
    if len(others) == len(general) + len(own):
        return others
    try:
        has_experts = load_sections([*others, f"{STAGE}{stage}"]).sections.get("adaptation") is not None
    except ConfigError:  # cannot be composed, which is reported with its faults
        return [*general, *own]
    return [*general, *own] if has_experts else others
