"""The `dynmoe` command: reads the verb, and turns every error a user can cause into a message and an exit code."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence

from dynmoe_ds.cli import (
    config,
    data,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    launch,
    plan,
    report,
    stages,
    tokenize,
    train,
    watch,
)
from dynmoe_ds.cli.help_text import EXIT_CODES, EXIT_USER_FAULT, LINE_LENGTH, override_help
from dynmoe_ds.errors import DynMoEError

EXIT_INTERRUPTED = 130

_EXAMPLES = """examples:
  dynmoe train experiment=demo                       train the demo on two CPU ranks
  dynmoe train experiment=demo router=top_any        the same with another router
  dynmoe config experiment=demo optim.lr=1e-3        print what a run would use
  dynmoe launch launch=slurm experiment=demo         submit it to a cluster
  dynmoe plan experiment=demo                        predict step time and memory of every layout
  dynmoe tokenize book.txt --out shards              write text as token shards for data=token_shards
  dynmoe data index web.jsonl --tokenizer FOLDER --out corpus/web   the same in Megatron's format
  dynmoe evaluate runs/demo                          what a trained model's held-out data say, once more
  dynmoe generate runs/demo --prompt "The "          let it write
  dynmoe report runs/demo runs/other                 compare runs in one web page
  dynmoe watch runs/demo                             a run in the browser while it goes on
  dynmoe inspect runs/demo/checkpoints               what is in the latest checkpoint of a run
  dynmoe doctor                                      check this machine
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with one sub-parser per verb."""
    parser = argparse.ArgumentParser(
        prog="dynmoe",
        description="Train mixture-of-experts models whose tokens choose how many experts they use and whose experts "
        "grow and are pruned, on stock DeepSpeed.",
        epilog="\n".join((_EXAMPLES, override_help(), EXIT_CODES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    before = (train, launch, stages, config, plan, tokenize, data, doctor)
    after = (evaluate, generate, export, report, watch, inspect)
    for verb in (*before, *after):
        verb.add_verb(verbs)
    for one in (parser, *verbs.choices.values()):
        # What keeps the lines of the examples keeps those of the description as well.
        one.description = textwrap.fill(one.description or "", LINE_LENGTH)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 2 for a user's fault, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The launcher adds --local_rank=N unless it is told not to; LOCAL_RANK says the same.
    arguments = [argument for argument in arguments if not re.fullmatch(r"--local[-_]rank=\d+", argument)]
    parsed = _parse(arguments)
    try:
        code: int = parsed.run(parsed)
    except DynMoEError as error:
        print(f"dynmoe: {error}", file=sys.stderr)
        return EXIT_USER_FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments, with options between overrides, too, where argparse takes the later overrides for faults."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed
