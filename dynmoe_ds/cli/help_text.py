"""What the help of several verbs says about overrides, with the options read from the configuration tree."""

from __future__ import annotations

import textwrap

from dynmoe_ds.config.groups import config_groups

LINE_LENGTH = 100
EXIT_USER_FAULT = 2

EXIT_CODES = """exit codes:
  0  done      1  failed      130  interrupted
  2  a fault in the command, the configuration or the data, or NaN in the training
  85  stopped by SIGUSR1, SIGTERM or a closed terminal after writing a checkpoint: the same command goes on,
      unless checkpoint.resume=never
  143 or 129  ended by SIGTERM or a closed terminal without one: it was not written within 25 s
"""


def override_help() -> str:
    """How overrides are written, and every group with its options."""
    groups = config_groups()
    width = max(len(group) for group in groups) + 1
    lines = [
        textwrap.fill(
            " | ".join(options),
            width=LINE_LENGTH,
            initial_indent=f"  {group + '=':<{width}} ",
            subsequent_indent=" " * (width + 3),
            break_on_hyphens=False,
        )
        for group, options in groups.items()
    ]
    return "\n".join(
        (
            "overrides, any number of them:",
            "  GROUP=OPTION         choose an option of a group",
            "  SECTION.KEY=VALUE    set one value, as in training.steps=100",
            "",
            "groups and their options:",
            *lines,
            "",
        )
    )
