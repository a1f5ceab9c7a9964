"""`dynmoe export`: the model of a finished run in Hugging Face's format."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe export runs/demo-20260101-120000 exported

Then, in Python:
  dm.register_auto_classes()
  model = AutoModelForCausalLM.from_pretrained("exported")     # AutoModelForImageTextToText for vision-language models
  tokenizer = AutoTokenizer.from_pretrained("exported")
"""
_TOKENIZER_FOLDER, _INPUT_FILE = "tokenizer", "vision_language.json"


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "export",
        help="write a trained model in Hugging Face's format",
        description="Write the model of a finished run, without free slots, with its tokenizer, as a folder that "
        "transformers' from_pretrained reads where dynmoe_ds is installed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of a run that has come to its end")
    parser.add_argument("folder", metavar="FOLDER", help="where to write; must not exist")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folder. Raises: DataError, ConfigError or CheckpointError, as `SavedRun` and `export_hugging_face`."""
    from dynmoe_ds.cli.launcher import name_accelerator

    name_accelerator(os.environ)
    from dynmoe_ds.export import export_hugging_face
    from dynmoe_ds.training.saved_run import SavedRun

    run_dir, folder = Path(arguments.run_dir), Path(arguments.folder)
    export_hugging_face(SavedRun(run_dir).model.cpu(), folder)
    if (run_dir / _TOKENIZER_FOLDER).is_dir():
        shutil.copytree(run_dir / _TOKENIZER_FOLDER, folder, dirs_exist_ok=True)
    if (run_dir / _INPUT_FILE).exists():
        shutil.copy(run_dir / _INPUT_FILE, folder)
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0
