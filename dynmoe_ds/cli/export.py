"""`dynmoe export`: the model of a run in Hugging Face's format."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe_ds.cli.saved import RUN_HELP, open_saved

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe export runs/demo-20260101-120000 exported

Then, in Python:
  dm.register_auto_classes()
  model = AutoModelForCausalLM.from_pretrained("exported")     # AutoModelForImageTextToText for vision-language models
  tokenizer = AutoTokenizer.from_pretrained("exported")
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "export",
        help="write a trained model in Hugging Face's format",
        description="Write the model of a run, finished or not, without free slots, with its tokenizer, as a folder "
        "that transformers' from_pretrained reads where dynmoe_ds is installed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN", help=RUN_HELP)
    parser.add_argument("folder", metavar="FOLDER", help="where to write: a new or an empty folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder. Raises: DataError, ConfigError or CheckpointError, as `SavedRun` and `export_hugging_face`."""
    from dynmoe_ds.cli.launcher import name_accelerator

    name_accelerator(os.environ)
    from dynmoe_ds.export import export_hugging_face
    from dynmoe_ds.training.tasks.vision_language import INPUT_FILE, TOKENIZER_FOLDER

    saved, folder = open_saved(arguments.run_dir), Path(arguments.folder)
    beside = [*sorted((saved.folder / TOKENIZER_FOLDER).glob("*")), *saved.folder.glob(INPUT_FILE)]
    export_hugging_face(saved.model.cpu(), folder, beside)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0
