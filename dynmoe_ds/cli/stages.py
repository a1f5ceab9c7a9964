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
from dynmoe_ds.cli.stage_overrides import DEFAULT_STAGES, overrides_by_stage, stage_folders
from dynmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

MODEL_FOLDER = "model"  # of training.trainer, which imports torch

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
    given = overrides_by_stage(arguments.overrides)
    faults = [*given.faults]
    try:
        folders = stage_folders(arguments.overrides, given.by_stage)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from None
    left = [folder for folder in folders.values() if not _is_finished(folder)]
    commands: dict[str, list[str]] = {}
    before: Path | None = None
    for name, folder in folders.items():
        overrides = [*given.by_stage[name], f"run_dir={folder}"]
        if folder in left:
            found = _faults(overrides, is_last=len(commands) + 1 == len(folders))
            faults += [fault for fault in found if fault not in faults]
        # Not before: the folder is there only when the stage before has come to its end.
        commands[name] = overrides if before is None else [*overrides, f"stage.start={before / MODEL_FOLDER}"]
        before = folder
    if faults:
        raise ConfigError(faults)
    for number, (name, folder) in enumerate(folders.items(), 1):
        print(f"dynmoe: stage {number} of {len(folders)}: {name}", flush=True)
        if folder not in left:
            print(f"dynmoe: {folder} has come to its end already", flush=True)
        elif code := train.run(argparse.Namespace(config=None, overrides=commands[name])):
            return code
    return 0


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
