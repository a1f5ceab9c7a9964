"""`dynmoe launch`: check a run and where it is to run, then submit or start it."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynmoe_ds.cli.help_text import EXIT_CODES, EXIT_USER_FAULT, override_help
from dynmoe_ds.config.groups import launch_names

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from dynmoe_ds.launching.config import (
        AnyLaunchConfig,
        DeepSpeedConfig,
        KubernetesConfig,
        LocalConfig,
        SlurmConfig,
        TorchrunConfig,
    )
    from dynmoe_ds.launching.runs import Runs

_ACCUMULATION = "training.gradient_accumulation_steps"

_EXAMPLES = """examples:
  dynmoe launch experiment=demo                                              here, as `dynmoe train` does
  dynmoe launch launch=slurm launch.nodes=2 launch.partition=gpu parallel=two_nodes run_dir=runs/first
  dynmoe launch --dry-run launch=site.yaml parallel=node run_dir=runs/first  what would be submitted
  dynmoe launch launch=slurm run_dir=runs/rates optim.lr=1e-3,3e-4 seed=0,1  a sweep: four runs as one array
"""


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "launch",
        help="submit a run, or a sweep, to Slurm, Kubernetes or a list of hosts",
        description="Check a run together with where it is to run, and submit it. Everything that is wrong is said "
        "at once, before anything is submitted. Code and configuration are copied into the run folder, so that what "
        "is changed later does not change the job.",
        epilog="\n".join((_EXAMPLES, _own_overrides(), override_help(), EXIT_CODES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and touch nothing")
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as of `dynmoe train`, and launch=, launch.KEY="
    )
    parser.set_defaults(run=run)


def _own_overrides() -> str:
    return "\n".join(
        (
            "overrides of this verb alone:",
            f"  launch=NAME          {' | '.join(launch_names())}",
            "  launch=FILE.yaml     a copy of one of configs/launch/ with what is of your site",
            "  launch.KEY=VALUE     such as launch.nodes=4, launch.time=12:00:00",
            "  KEY=VALUE,VALUE      a run for each value, and for each combination of several such keys",
            "",
        )
    )


def run(arguments: argparse.Namespace) -> int:
    """Submit the job, or start it and wait for it. Raises: as `check_and_launch`."""
    return check_and_launch(arguments.overrides, is_dry=arguments.dry_run)


def check_and_launch(overrides: Sequence[str], *, is_dry: bool = False, needs_sweep: bool = False) -> int:
    """Submit what the overrides say, or start it and wait for it. needs_sweep: whether one run alone is a fault.

    Raises: ConfigError with every fault of the run's overrides and the verb's own; LaunchError if it is refused.
    """
    from dynmoe_ds.config.own_groups import split_overrides
    from dynmoe_ds.errors import ConfigError
    from dynmoe_ds.launching.checks import find_launch_faults, find_missing_programs, with_global_batch
    from dynmoe_ds.launching.config import KubernetesConfig
    from dynmoe_ds.launching.load import load_launch
    from dynmoe_ds.launching.runs import find_num_ranks, load_runs

    split = split_overrides(overrides, ("launch",))
    name, values = "local", []
    for key, value in split.own:
        if key == "launch":
            name = str(value)
        else:
            values.append((key.removeprefix("launch."), value))
    launch, own_faults = load_launch(name, values)
    faults, runs = [*split.faults, *own_faults], None
    try:
        runs = load_runs(split.others, check_files=not isinstance(launch, KubernetesConfig))
    except ConfigError as error:
        faults += error.faults
    if needs_sweep and runs is not None and not runs.is_sweep:
        faults.append("--multirun is given, but every key has one value. Give several (seed=0,1), or leave it out.")
    if launch is not None:
        num_ranks = find_num_ranks(split.others) if runs is None else runs.num_ranks
        faults += [] if num_ranks is None else _rank_faults(launch, num_ranks)
        if launch.global_batch_size is not None and any(_ACCUMULATION in text for text in split.others):
            faults.append(
                f"launch.global_batch_size is {launch.global_batch_size} and {_ACCUMULATION} is given, too, which "
                "follows from it. Leave out one of them."
            )
        if not is_dry:
            faults += find_missing_programs(launch)
    if launch is not None and runs is not None:
        faults += find_launch_faults(launch, runs)
        try:
            runs = with_global_batch(runs, launch.global_batch_size)
        except ConfigError as error:
            faults += error.faults
    if faults or launch is None or runs is None:
        raise ConfigError(faults)
    return _launch(launch, runs, is_dry=is_dry)


def _rank_faults(launch: AnyLaunchConfig, num_ranks: int) -> list[str]:
    """Why there is no place for so many ranks, here or where they are launched."""
    from dynmoe_ds.cli.launcher import check_devices
    from dynmoe_ds.errors import ConfigError
    from dynmoe_ds.launching.checks import find_rank_faults
    from dynmoe_ds.launching.config import LocalConfig

    if not isinstance(launch, LocalConfig):
        return find_rank_faults(launch, num_ranks)
    try:
        check_devices(num_ranks)
    except ConfigError as error:
        return list(error.faults)
    return []


def _launch(launch: AnyLaunchConfig, runs: Runs, *, is_dry: bool) -> int:
    from dynmoe_ds.launching.config import DeepSpeedConfig, KubernetesConfig, LocalConfig, SlurmConfig, TorchrunConfig

    match launch:
        case LocalConfig():
            return _local(launch, runs, is_dry=is_dry)
        case DeepSpeedConfig() | TorchrunConfig():
            return _hosts(launch, runs, is_dry=is_dry)
        case SlurmConfig():
            return _slurm(launch, runs, is_dry=is_dry)
        case KubernetesConfig():
            return _kubernetes(launch, runs, is_dry=is_dry)


def _local(launch: LocalConfig, runs: Runs, *, is_dry: bool) -> int:
    """Train here, a sweep's runs one after the other, each in processes of its own."""
    from dynmoe_ds.cli import train
    from dynmoe_ds.launching.freeze import config_file, freeze, sweep_table

    own = [f"{config_file(config.run_dir)}" for config in runs.configs]
    if runs.is_sweep:
        print(sweep_table(runs), end="", flush=True)
    if is_dry:
        print("\n".join(shlex.join(("dynmoe", "train", "--config", file)) for file in own))
        return 0
    freeze(launch, runs, {}, with_code=False)
    os.environ.update(launch.variables())
    if runs.is_sweep:
        return _local_sweep(runs, own)
    return train.run(argparse.Namespace(config=own[0], overrides=[]))


def _local_sweep(runs: Runs, files: Sequence[str]) -> int:
    """A run that fails is left behind, and told of at the end; one that was stopped ends the sweep.

    The code of the first one that failed, or of the one that was stopped.
    """
    from dynmoe_ds.cli import train
    from dynmoe_ds.errors import DynMoEError
    from dynmoe_ds.telemetry.run_state import STOP_CODES, finished_steps
    from dynmoe_ds.telemetry.sweep import read_sweep, write_summary

    failed: dict[int, int] = {}
    stopped = 0
    for number, (file, config) in enumerate(zip(files, runs.configs, strict=True)):
        print(f"dynmoe: run {number} of {len(files)}: {' '.join(runs.choices[number])}", flush=True)
        if (finished_steps(config.run_dir) or 0) >= config.training.steps:
            print(f"dynmoe: {config.run_dir} has come to its end already", flush=True)
            continue
        try:
            code = train.run(argparse.Namespace(config=file, overrides=[]))
        except DynMoEError as error:
            print(f"dynmoe: {error}", file=sys.stderr, flush=True)
            code = EXIT_USER_FAULT
        if code in STOP_CODES:
            stopped = code
            break
        if code:
            failed[number] = code
    print(f"\n{write_summary(read_sweep(runs.folder))}", flush=True)
    print(f"dynmoe: `dynmoe report {runs.folder}` makes this table, and a page with pictures", flush=True)
    if failed:
        listed = ", ".join(f"{number} (exit code {code})" for number, code in failed.items())
        print(
            f"dynmoe: {len(failed)} of {len(files)} runs failed: {listed}. The same command starts these again, from "
            "their latest checkpoints where there are any.",
            file=sys.stderr,
        )
    return stopped or next(iter(failed.values()), 0)


def _hosts(launch: DeepSpeedConfig | TorchrunConfig, runs: Runs, *, is_dry: bool) -> int:
    """Start the ranks on the hosts and wait for them, or print what each host is to run."""
    from dynmoe_ds.launching import hosts
    from dynmoe_ds.launching.config import TorchrunConfig
    from dynmoe_ds.launching.freeze import freeze

    text = "\n".join(hosts.lines(launch, runs))
    if is_dry:
        print(text)
        return 0
    freeze(launch, runs, hosts.files(launch, runs), with_code=False)
    if isinstance(launch, TorchrunConfig) and launch.start == "print":
        print(text)
        return 0
    print(f"dynmoe: starting {runs.num_ranks} ranks; run folder {runs.folder}; Ctrl-C stops", flush=True)
    code = hosts.start(launch, runs)
    if code:
        print(_how_it_ended(code), file=sys.stderr, flush=True)
    return code


def _how_it_ended(code: int) -> str:
    """The last line of a launch on hosts, after what the ranks and their launchers have said."""
    from dynmoe_ds.errors import EXIT_PREEMPTED

    again = "The same command goes on from the latest checkpoint, if there is one and checkpoint.resume is auto."
    if code == EXIT_PREEMPTED:
        return f"dynmoe: stopped as asked, with a checkpoint. {again}"
    if code == 128 + signal.SIGINT:
        return "interrupted"
    if code - 128 in {*signal.Signals}:  # mpirun ends with 255 when a host does not answer
        return f"dynmoe: ended by {signal.Signals(code - 128).name}, without a new checkpoint. {again}"
    return f"dynmoe: the job has failed (exit code {code}). What its ranks said first, above, may tell why. {again}"


def _slurm(launch: SlurmConfig, runs: Runs, *, is_dry: bool) -> int:
    from dynmoe_ds.launching import slurm
    from dynmoe_ds.launching.freeze import launch_folder, sweep_table

    if is_dry:
        print(slurm.render(launch, runs), end="")
    else:
        job = slurm.submit(launch, runs)
        log = "job-*.log" if runs.is_sweep else f"job-{job}.log"
        print(f"dynmoe: submitted job {job}; run folder {runs.folder}; log {launch_folder(runs.folder) / log}")
        if runs.is_sweep:
            print(sweep_table(runs), end="")
    return 0


def _kubernetes(launch: KubernetesConfig, runs: Runs, *, is_dry: bool) -> int:
    from dynmoe_ds.launching import kubernetes

    if is_dry:
        print(kubernetes.render(launch, runs), end="")
    else:
        print(kubernetes.submit(launch, runs), end="")
    return 0
