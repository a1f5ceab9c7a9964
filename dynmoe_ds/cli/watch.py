"""`dynmoe watch`: a run's report in a browser while it goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe watch runs/demo-20260101-120000
  ssh -L 8000:127.0.0.1:8000 HOST dynmoe watch /shared/runs/first --port 8000     a run on a cluster, seen from here
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "watch",
        help="show a run in the browser while it goes on",
        description="Serve the report of a run, which goes on or is over, as a page that refreshes itself, to browsers "
        "on this machine. Ctrl-C ends it; the run does not notice.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of the page (default: a free one)")
    parser.add_argument(
        "--every", type=float, default=10.0, metavar="S", help="seconds between two looks (default: 10)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises: ConfigError for values that cannot work; DataError for a folder that is no run's."""
    from dynmoe_ds.telemetry.comparison import runs_in
    from dynmoe_ds.telemetry.live_page import live_server

    if arguments.every <= 0:
        raise ConfigError(f"--every is {arguments.every:g} but must be above 0.")
    folder = Path(arguments.run_dir)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder (seen from {Path.cwd()}). Give the folder of a run (run_dir).")
    runs = runs_in(folder)
    if len(runs) > 1:
        raise ConfigError(f"{folder} holds {len(runs)} runs. Name one of them, such as {runs[-1]}.")
    shown = runs[0] if runs else folder  # a run that has not begun has a folder when it was launched
    with live_server(shown, arguments.port, arguments.every) as server:
        waiting = "" if runs else ", which has nothing to show yet"
        print(f"dynmoe: http://127.0.0.1:{server.server_port}/ shows {shown}{waiting}; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
