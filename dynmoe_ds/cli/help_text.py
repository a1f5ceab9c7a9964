"""What the help of several verbs says about overrides, with the options read from the configuration tree."""

from __future__ import annotations

from dynmoe_ds.config.groups import config_groups

EXIT_CODES = """exit codes:
  0  done      1  failed      2  a fault in the command, the configuration or the data      130  interrupted
"""


def override_help() -> str:
    """How overrides are written, and every group with its options."""
    groups = config_groups()
    width = max(len(group) for group in groups) + 1
    lines = [f"  {group + '=':<{width}} {' | '.join(options)}" for group, options in groups.items()]
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
