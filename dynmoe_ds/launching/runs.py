"""What is launched: one run, or the runs of a sweep, each with its own configuration and folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from dynmoe_ds.config.load import load_config, load_sections
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """`configs` to train, each into its own `run_dir`, all absolute.

    folder: of the one run; of a sweep, the one with the folders of its runs. choices: what tells each run from the
    others, as overrides; nothing for a run that is no sweep's.
    """

    folder: Path
    configs: tuple[RunConfig, ...]
    choices: tuple[tuple[str, ...], ...]

    @property
    def is_sweep(self) -> bool:
        return bool(self.choices[0])

    @property
    def num_ranks(self) -> int:
        """Of each run."""
        return self.configs[0].parallel.num_ranks


def load_runs(overrides: Sequence[str], *, check_files: bool = True) -> Runs:
    """The checked run of overrides, or those of a sweep: `optim.lr=1e-3,1e-4 seed=range(3)` are six.

    A sweep's runs have the folders `<run_dir>/0`, `<run_dir>/1`, ...; the last override turns fastest.
    check_files: whether to look for the files that the configuration names.

    Raises: ConfigError with every fault of every run, each once.
    """
    faults: list[str] = []
    common, swept, run_dir = _split_sweep(overrides, faults)
    if not swept and not faults:
        config = _with_absolute_folder(load_config(common, check_files=check_files))
        return Runs(folder=Path(config.run_dir), configs=(config,), choices=((),))
    if run_dir is None:
        faults.append("run_dir is not set. A sweep needs a folder for the folders of its runs: run_dir=runs/NAME.")
    folder = Path(os.path.abspath(run_dir or "runs/sweep"))
    choices = tuple(itertools.product(*swept))
    configs: list[RunConfig] = []
    for number, chosen in enumerate(choices):
        try:
            own = [*common, *chosen, f"run_dir={_quoted(folder / f'{number}')}"]
            configs.append(load_config(own, check_files=check_files))
        except ConfigError as error:
            faults += [fault for fault in error.faults if fault not in faults]
    ranks = sorted({config.parallel.num_ranks for config in configs})
    if len(ranks) > 1:
        faults.append(
            f"parallel.num_ranks is {' and '.join(map(str, ranks))} in runs of one sweep, but all get the same nodes. "
            "Start a sweep per number of ranks."
        )
    if faults:
        raise ConfigError(faults)
    return Runs(folder=folder, configs=tuple(configs), choices=choices)


def find_num_ranks(overrides: Sequence[str]) -> int | None:
    """Ranks of the run of overrides, or of the first of a sweep, whatever is wrong beside them; None where they are."""
    common, swept, _ = _split_sweep(overrides, [])
    try:
        sections = load_sections([*common, *(values[0] for values in swept)]).sections
    except ConfigError:
        return None
    ranks = sections["parallel"].num_ranks if "parallel" in sections else 0
    return ranks if ranks >= 1 else None


def _with_absolute_folder(config: RunConfig) -> RunConfig:
    return replace(config, run_dir=os.path.abspath(config.run_dir))


def _split_sweep(overrides: Sequence[str], faults: list[str]) -> tuple[list[str], list[tuple[str, ...]], str | None]:
    """The overrides with one value, for each of the others its values as overrides of their own, and the run_dir.

    What cannot be read is left for `load_config` to report; a sweep without values to go through goes to `faults`.
    """
    parser = OverridesParser.create()
    common: list[str] = []
    swept: list[tuple[str, ...]] = []
    run_dir: str | None = None
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException:
            common.append(text)
            continue
        if override.is_sweep_override():
            try:
                swept.append(_sweep_values(override))
            except ConfigError as error:
                faults += error.faults
        else:
            common.append(text)
            if override.key_or_group == "run_dir" and override.value() is not None:
                run_dir = f"{override.value()}"
    return common, swept, run_dir


def _sweep_values(override: Override) -> tuple[str, ...]:
    """The values of a sweep's key, as overrides of their own. Raises: ConfigError where there is no list of them."""
    key, text, sweep = override.get_key_element(), override.input_line, override.value()
    if getattr(sweep, "shuffle", False):
        raise ConfigError(
            f"The override {text!r} shuffles its values, so that the same command, given again, would be another "
            "sweep. Leave out the shuffling."
        )
    try:
        values = tuple(f"{key}={value}" for value in override.sweep_string_iterator())
    except (HydraException, ValueError) as error:  # interval(...), glob(...), a range with steps of 0
        raise ConfigError(
            f"The values of the override {text!r} cannot be enumerated. Write them with commas, or as "
            "range(START,STOP,STEP)."
        ) from error
    if not values:
        raise ConfigError(f"The override {text!r} holds no value. Write at least one, or leave it out.")
    return values


def _quoted(path: Path) -> str:
    """A path as a value of an override: commas and spaces mean something there."""
    text = f"{path}".replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
