"""`dynmoe stages`: the stages of vision-language training one after the other, each from what the last one left."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe_ds.cli import train
from dynmoe_ds.cli.given_ranks import adopt_rank
from dynmoe_ds.cli.help_text import EXIT_CODES, override_help
from dynmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

MODEL_FOLDER = "model"  # of training.trainer, which imports torch
DEFAULT_STAGES = "projector,language,experts"
_NAMES, _RUN_DIR = "stages=", "run_dir="

_EXAMPLES = """examples:
  dynmoe stages experiment=demo_vl run_dir=runs/demo_vl stages=demo_projector,demo_language,demo_experts
  dynmoe stages experiment=moe_llava_stablelm model.vision_pretrained=clip model.text_pretrained=stablelm \
    data.tokenizer=stablelm data.image_folder=images data.held_out_path=held_out.json \
    projector:data.path=captions.json language:data.path=instructions.json experts:data.path=mix.json

`NAME:` before an override makes it one of that stage alone. adaptation.KEY=VALUE is for the stages with experts.
A stage's run folder is <run_dir>/<number>_<stage>. With the same run_dir the same command goes on where it was stopped:
stages that have come to their end are left alone.
One stage alone: dynmoe train stage=language stage.start=<run folder of the first>/model.
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "stages",
        help="train a vision-language model in stages",
        description="Run `dynmoe train` once per stage, each from the model that the last one left. All stages are "
        "checked before the first one is started.",
        epilog=f"{_EXAMPLES}\n{override_help()}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help=f"as of `dynmoe train`; stages=NAMES, of the group `stage` (default: {DEFAULT_STAGES}); NAME:OVERRIDE",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train the stages; the exit code of the first one that fails, or 0.

    Raises: ConfigError with every fault of every stage, before anything is started.
    """
    adopt_rank(os.environ)
    if "RANK" in os.environ:
        raise ConfigError("`dynmoe stages` starts launchers itself. Under a launcher use `dynmoe train stage=NAME`.")
    names = (_value(arguments.overrides, _NAMES) or DEFAULT_STAGES).split(",")
    general = [text for text in arguments.overrides if not text.startswith((_NAMES, _RUN_DIR))]
    marks = {name: f"{name}:" for name in names}
    of_stages = {
        name: [text.removeprefix(mark) for text in general if text.startswith(mark)] for name, mark in marks.items()
    }
    general = [text for text in general if not text.startswith(tuple(marks.values()))]
    reserved = [text for own in of_stages.values() for text in own if text.startswith(("stage=", _RUN_DIR))]
    faults = [f"{text} cannot be of one stage: `dynmoe stages` sets it. Leave it out." for text in reserved]
    base = _run_dir(arguments.overrides, [*general, *of_stages[names[0]]], names[0])
    folders = [base / f"{number}_{name}" for number, name in enumerate(names, 1)]
    left = [folder for folder in folders if not _is_finished(folder)]
    commands: dict[Path, list[str]] = {}
    for name, folder, before in zip(names, folders, [None, *folders], strict=False):
        overrides = [*_without_adaptation(name, general, of_stages[name]), f"stage={name}", f"run_dir={folder}"]
        if folder in left:
            found = _faults(overrides, is_last=folder == folders[-1])
            faults += [fault for fault in found if fault not in faults]
        # Not before: the folder is there only when the stage before has come to its end.
        commands[folder] = overrides if before is None else [*overrides, f"stage.start={before / MODEL_FOLDER}"]
    if faults:
        raise ConfigError(faults)
    for number, folder in enumerate(folders, 1):
        print(f"dynmoe: stage {number} of {len(folders)}: {names[number - 1]}", flush=True)
        if folder not in left:
            print(f"dynmoe: {folder} has come to its end already", flush=True)
        elif code := train.run(argparse.Namespace(config=None, overrides=commands[folder])):
            return code
    return 0


def _value(overrides: Sequence[str], key: str) -> str | None:
    """What is given last for `key`, which ends with an equals sign."""
    return next((text.removeprefix(key) for text in reversed(overrides) if text.startswith(key)), None)


def _run_dir(overrides: Sequence[str], others: Sequence[str], first_stage: str) -> Path:
    """The folder of all stages. Raises: ConfigError if none is given and the configuration cannot be read."""
    from dynmoe_ds.config.load import load_config

    return Path(_value(overrides, _RUN_DIR) or load_config([*others, f"stage={first_stage}"]).run_dir)


def _without_adaptation(stage: str, general: Sequence[str], own: Sequence[str]) -> list[str]:
    """A stage's overrides, its `own` after the `general` ones, less those of experts that a stage without has not."""
    from dynmoe_ds.config.load import load_config

    others = [*(text for text in general if not text.startswith(("adaptation.", "adaptation="))), *own]
    try:
        has_experts = load_config([*others, f"stage={stage}"]).adaptation is not None
    except ConfigError:
        return [*general, *own]  # which is reported with its faults
    return [*general, *own] if has_experts else others


def _faults(overrides: Sequence[str], is_last: bool) -> Sequence[str]:
    from dynmoe_ds.config.load import load_config

    try:
        config = load_config(overrides)
    except ConfigError as error:
        return error.faults
    if not config.training.save_model and not is_last:
        return ["training.save_model is false, but the next stage starts from the model. Set it to true."]
    return ()


def _is_finished(folder: Path) -> bool:
    from dynmoe_ds.telemetry.run_state import finished_steps

    return finished_steps(folder) is not None
