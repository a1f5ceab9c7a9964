"""`dynmoe config`: print the configuration that a run would use."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dynmoe_ds.cli.help_text import override_help

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe config
  dynmoe config experiment=demo router=top_any training.steps=100
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "config",
        help="print the configuration that a run would use, checked and complete",
        description="Print, as YAML, the configuration that `dynmoe train` would use with the same overrides, after "
        "the same checks. Nothing is started and nothing is written.",
        epilog=f"{_EXAMPLES}\n{override_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or SECTION.KEY=VALUE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the configuration.

    Raises: ConfigError with every fault.
    """
    from dynmoe_ds.config.load import load_config, to_yaml

    print(to_yaml(load_config(arguments.overrides)), end="")
    return 0
