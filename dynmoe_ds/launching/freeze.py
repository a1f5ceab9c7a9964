"""A job's own copy of the code and of the configuration, so that later edits do not change it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from dynmoe_ds.config.load import to_plain, to_yaml
from dynmoe_ds.config.validate import LAUNCH_FOLDER
from dynmoe_ds.launching.config import AnyLaunchConfig
from dynmoe_ds.launching.runs import Runs
from dynmoe_ds.telemetry.run_folder import SWEEP_FILE, collect_versions
from dynmoe_ds.telemetry.run_owner import refuse_if_in_use

PACKAGES = ("dynmoe_ds", "dynmoe_kernels", "dynmoe_configs")
_CODE, _CONFIG = "code", "config.yaml"


def launch_folder(run_dir: Path) -> Path:
    """Where everything of the launch of a run, or of a sweep, is."""
    return run_dir / LAUNCH_FOLDER


def code_folder(runs: Runs) -> Path:
    """What goes first on the ranks' PYTHONPATH."""
    return launch_folder(runs.folder) / _CODE


def config_file(run_dir: str | Path) -> Path:
    """The resolved configuration of one run, for `dynmoe train --config`."""
    return launch_folder(Path(run_dir)) / _CONFIG


def freeze(launch: AnyLaunchConfig, runs: Runs, files: Mapping[str, str], *, with_code: bool) -> None:
    """Write each run's configuration, `files` by name, and the code if it is wanted, into the launch folders, anew.

    A sweep's table of runs goes into its folder, too. The output of earlier jobs stays.
    Raises: LaunchError if another process trains into a run folder, before anything is written.
    """
    for config in runs.configs:
        refuse_if_in_use(config.run_dir)
    folders = {launch_folder(runs.folder), *(launch_folder(Path(config.run_dir)) for config in runs.configs)}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(code_folder(runs), ignore_errors=True)
    for package in PACKAGES if with_code else ():
        _copy_package(package, code_folder(runs))
    for config in runs.configs:
        config_file(config.run_dir).write_text(to_yaml(config), encoding="utf-8")
    own = launch_folder(runs.folder)
    source = {"command": sys.argv, "folder": os.getcwd(), **collect_versions()}
    (own / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    (own / "launch.json").write_text(json.dumps(to_plain(launch), indent=2) + "\n", encoding="utf-8")
    for name, text in files.items():
        (own / name).write_text(text, encoding="utf-8")
    if runs.is_sweep:
        (runs.folder / SWEEP_FILE).write_text(sweep_table(runs), encoding="utf-8")


def sweep_table(runs: Runs) -> str:
    """Which run of a sweep is which: a line each with its number, which is its folder's name, and its overrides."""
    keys = [text.partition("=")[0] for text in runs.choices[0]]
    rows = [["run", *keys]]
    rows += [[f"{number}", *(text.partition("=")[2] for text in own)] for number, own in enumerate(runs.choices)]
    return "".join("\t".join(row) + "\n" for row in rows)


def _copy_package(name: str, folder: Path) -> None:
    """The installed package, wherever it lies: a checkout with its edits, or site-packages."""
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations, name
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
    shutil.copytree(next(iter(spec.submodule_search_locations)), folder / name, ignore=ignored)
