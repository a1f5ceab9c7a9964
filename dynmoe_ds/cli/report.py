"""`dynmoe report`: a web page about a run, or one that compares several."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_EXAMPLES = """examples:
  dynmoe report runs/demo-20260101-120000            writes report.html into the run's folder
  dynmoe report runs/demo_vl                         the runs in a folder, such as the stages of `dynmoe stages`
  dynmoe report runs/rates                           a sweep: its table, printed and left as sweep.md and sweep.csv
  dynmoe report runs/top_2 runs/dynamic --out comparison.html
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "report",
        help="write a web page about runs",
        description="Write one self-contained web page from run folders alone: about a run, or several side by side, "
        "with the settings that differ. Of a sweep also a table of what came of each run. Runs that are still going on "
        "are shown as far as they are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of such folders")
    parser.add_argument("--out", metavar="FILE", help="the page of several runs (default: report.html beside them)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page. Raises: ConfigError or DataError for folders that cannot be used."""
    from dynmoe_ds.telemetry.comparison import find_runs, write_comparison, write_sweep_page
    from dynmoe_ds.telemetry.report import REPORT_FILE, write_report
    from dynmoe_ds.telemetry.sweep import is_sweep, read_sweep, write_summary

    first = Path(arguments.runs[0])
    if len(arguments.runs) == 1 and is_sweep(first):
        sweep = read_sweep(first)
        print(write_summary(sweep))
        print(write_sweep_page(sweep, arguments.out or first / REPORT_FILE))
        return 0
    runs = find_runs(arguments.runs)
    if len(runs) > 1:
        beside = Path(os.path.commonpath([run.resolve().parent for run in runs]))
        print(write_comparison(runs, arguments.out or beside / REPORT_FILE))
    elif arguments.out is not None:
        raise ConfigError(f"--out is of a page of several runs. That of one goes into its folder, {runs[0]}.")
    else:
        print(write_report(runs[0]))
    return 0
