"""`dynmoe evaluate`: the held-out data of a run once more, in one process."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from dynmoe_ds.cli import evaluate_tasks
from dynmoe_ds.cli.saved import MODEL_HELP, open_saved
from dynmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe evaluate runs/demo-20260101-120000
  dynmoe evaluate runs/demo_vl/3_demo_experts --answers answers.png
  dynmoe evaluate runs/demo/checkpoints/step-00000500     # of a run that goes on, or was killed
  dynmoe evaluate runs/demo-20260101-120000 --tasks arc_easy,hellaswag --limit 100
  dynmoe evaluate exported --held-out questions.json --image-folder images   # or what `dynmoe import` wrote
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "evaluate",
        help="evaluate a trained model",
        description="Print what the model of a run of text or vision-language, finished or not, measures on its "
        "held-out data, with the mean number of experts per token and active parameters beside it, in one process. "
        "docs/metrics.md explains the names.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="of a vision-language run: a PNG to write, of held-out questions, answers and the experts that fired; as "
        "answers.png in the run's folder it is in the report, too",
    )
    parser.add_argument(
        "--held-out",
        metavar="FILE",
        help="of a vision-language model: conversations in LLaVA's JSON to evaluate on instead of the run's own",
    )
    parser.add_argument("--image-folder", metavar="DIR", help="where the images of --held-out are")
    evaluate_tasks.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics.

    Raises: ConfigError for options that do not go together; DataError or CheckpointError for a folder, or data, that
    cannot be used.
    """
    from dynmoe_ds.cli.launcher import name_accelerator

    name_accelerator(os.environ)
    evaluate_tasks.check_options(arguments)
    _check_held_out(arguments)
    if arguments.tasks is not None:
        return evaluate_tasks.run(arguments)
    saved = open_saved(arguments.run_dir)
    if arguments.answers is not None:
        from dynmoe_ds.training.answer_pictures import draw_answers

        draw_answers(saved, arguments.answers)
    task = None
    if arguments.held_out is not None:
        from dynmoe_ds.training.held_out_conversations import HeldOutConversations

        task = HeldOutConversations(saved, arguments.held_out, arguments.image_folder)
    values = {metric.name: metric.value for metric in saved.evaluate(task)}
    if arguments.json:
        print(json.dumps(values, indent=2))
    else:
        width = max(map(len, values))
        for name, value in values.items():
            print(f"{name:<{width}}  {value:,.6g}")
    return 0


def _check_held_out(arguments: argparse.Namespace) -> None:
    """Raises: ConfigError for `--held-out` beside what has data of its own."""
    if arguments.held_out is None and arguments.image_folder is not None:
        raise ConfigError("--image-folder belongs to --held-out.")
    if arguments.held_out is not None and (arguments.tasks is not None or arguments.answers is not None):
        raise ConfigError("--held-out takes the place of a run's own data. Leave out --tasks and --answers.")
