"""`dynmoe generate`: text by the model of a run."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe_ds.cli.saved import MODEL_HELP, open_saved
from dynmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from dynmoe_ds.training.writer import Prompt

_EXAMPLES = """examples:
  dynmoe generate runs/demo-20260101-120000 --prompt "The "
  dynmoe generate runs/demo_vl/3_demo_experts --prompt "<image>Which digit is this?" --image seven.png
  dynmoe generate runs/demo_vl/3_demo_experts --file questions.json
  dynmoe generate runs/demo/checkpoints/step-00000500 --prompt "The "   # of a run that goes on, or was killed
  dynmoe generate exported --prompt "The "   # what `dynmoe export` wrote

A file of prompts is a JSON list of {"text": ..., "images": [...]}; its prompts are written to in one batch.
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "generate",
        help="let a trained model write",
        description="Print what the model of a run, finished or not, or of an export writes after each prompt, in one "
        "process, with a cache.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("--prompt", metavar="TEXT", help="with <image> wherever an image stands")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image of the prompt")
    parser.add_argument("--file", metavar="FILE", help="prompts in JSON, instead of --prompt")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="at most so many new tokens (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one text per prompt.

    Raises: ConfigError for values and prompts that cannot work; DataError or CheckpointError for a folder that cannot.
    """
    from dynmoe_ds.cli.launcher import name_accelerator

    name_accelerator(os.environ)
    from dynmoe_ds.training.writer import Writer

    faults = []
    if (arguments.prompt is None) == (arguments.file is None):
        faults.append("Give one of --prompt and --file.")
    if arguments.file is not None and arguments.image:
        faults.append("--image belongs to --prompt. With --file, images stand in the file.")
    if arguments.tokens < 1:
        faults.append(f"--tokens is {arguments.tokens} but must be at least 1.")
    if arguments.temperature < 0:
        faults.append(f"--temperature is {arguments.temperature} but must not be negative.")
    if faults:
        raise ConfigError(faults)
    prompts = _prompts(arguments)
    writer = Writer(open_saved(arguments.run_dir))
    for text in writer.write(prompts, arguments.tokens, arguments.temperature, arguments.seed):
        print(text)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    from dynmoe_ds.training.writer import Prompt

    if arguments.prompt is not None:
        return [Prompt(text=arguments.prompt, images=tuple(map(Path, arguments.image)))]
    try:
        given = json.loads(Path(arguments.file).read_text(encoding="utf-8"))
        return [_prompt(one["text"], one.get("images", [])) for one in given]
    except OSError as error:
        raise ConfigError(f"{arguments.file} cannot be read: {error.strerror} (seen from {Path.cwd()}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{arguments.file} is no JSON list of prompts ({type(error).__name__}: {error}). Write "
            '[{"text": "...", "images": ["..."]}, ...].'
        ) from error


def _prompt(text: object, images: object) -> Prompt:
    """Raises: TypeError for anything but a text and a list of texts."""
    from dynmoe_ds.training.writer import Prompt

    if not isinstance(text, str) or not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise TypeError(f"text {text!r}, images {images!r}")
    return Prompt(text=text, images=tuple(map(Path, images)))
