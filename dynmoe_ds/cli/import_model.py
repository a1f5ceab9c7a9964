"""`dynmoe import`: a model of DynMoE's or MoE-LLaVA's authors for this package."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe import DynMoE-StableLM-1.6B imported --vision-tower clip-vit-large-patch14-336 --tokenizer stablelm-2-1_6b
  dynmoe import DynMoE-Qwen-1.8B text --text-only --tokenizer Qwen1.5-1.8B

Then:
  dynmoe generate imported --prompt "<image>What is it?" --image a.jpg
  dynmoe evaluate imported --held-out questions.json --image-folder images
  dynmoe export imported exported
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "import",
        help="read a published checkpoint of DynMoE",
        description="Write the model of a folder as DynMoE's and MoE-LLaVA's authors publish it (StableLM, Phi, the "
        "first Qwen) into a folder that generate, evaluate and export take. Nothing is downloaded.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of the published checkpoint")
    parser.add_argument("folder", metavar="FOLDER", help="where to write: a new or an empty folder")
    parser.add_argument("--vision-tower", metavar="DIR", help="the folder of the CLIP that the model sees by")
    parser.add_argument("--text-only", action="store_true", help="the language model without tower and projector")
    parser.add_argument("--tokenizer", metavar="DIR", help="the tokenizer (default: in the checkpoint)")
    parser.add_argument(
        "--template", choices=("plain", "vicuna", "own"), default="vicuna",
        help="how a question becomes a prompt (default: vicuna, on which the published models were trained)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder. Raises: as `import_to_folder`."""
    from dynmoe_ds.cli.launcher import name_accelerator

    name_accelerator(os.environ)
    from dynmoe_ds.training.imported_model import import_to_folder

    import_to_folder(
        arguments.checkpoint,
        arguments.folder,
        vision_tower=arguments.vision_tower,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        text_only=arguments.text_only,
    )
    print(f"{arguments.folder}: model, tokenizer")
    return 0
