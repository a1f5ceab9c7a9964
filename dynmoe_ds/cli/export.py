"""`dynmoe export`: the model of a run in Hugging Face's format."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dynmoe_ds.cli.saved import RUN_HELP, open_saved
from dynmoe_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from dynmoe_ds.training.saved_run import SavedRun

_EXAMPLES = """examples:
  dynmoe export runs/demo-20260101-120000 exported

Then, in Python:
  dm.register_auto_classes()
  model = AutoModelForCausalLM.from_pretrained("exported")     # AutoModelForImageTextToText for vision-language models
  tokenizer = AutoTokenizer.from_pretrained("exported")        # AutoProcessor, which takes images, too
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
    from dynmoe_ds.training.saved_run import is_hugging_face

    if is_hugging_face(Path(arguments.run_dir)):
        raise ConfigError(
            f"{arguments.run_dir} is in Hugging Face's format already. Copy the folder; or, if it is a published "
            "checkpoint of DynMoE or MoE-LLaVA, run `dynmoe import` first, and name what it wrote."
        )
    saved, folder = open_saved(arguments.run_dir), Path(arguments.folder)
    with TemporaryDirectory() as aside:
        if not _write_processor(saved, Path(aside)):
            for file in saved.tokenizer_folder.glob("*"):
                shutil.copy(file, aside)
        export_hugging_face(saved.model.cpu(), folder, sorted(Path(aside).iterdir()))
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0


def _write_processor(saved: SavedRun, folder: Path) -> bool:
    """Whether there are now the files of a vision-language model's processor, with its tokenizer, in `folder`."""
    from dynmoe_ds.data.processor import save_processor
    from dynmoe_ds.training.tasks.vision_language import INPUT_FILE
    from dynmoe_ds.training.writer import Writer

    if not (saved.folder / INPUT_FILE).exists():
        return False
    shutil.copy(saved.folder / INPUT_FILE, folder)
    try:
        processor = Writer(saved).processor()
    except DataError as error:
        print(f"dynmoe: no processor for transformers is written. {error}", file=sys.stderr)
        return False
    assert processor is not None, f"{INPUT_FILE} is there"
    save_processor(processor, folder)
    return True
