"""Command-line overrides and the YAML tree to a checked `RunConfig`, with every fault reported at once.

Hydra composes the groups. Values from the command line are applied afterwards and without its struct mode, which would
stop at the first unknown key: this way a misspelt key reaches the strict builder with all the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe_ds.config.build import BuiltSections, build_sections
from dynmoe_ds.config.groups import CONFIG_MODULE, config_groups, did_you_mean
from dynmoe_ds.config.resolvers import register_resolvers
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.config.validate import find_faults_in
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import RouterConfig, router_config, router_names

RUN_DIR_VARIABLE = "DYNMOE_RUN_DIR"
_OFF = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Overrides:
    """Parsed overrides: `choices` of group options and `values` by dotted key, in the order given."""

    choices: tuple[tuple[str, str], ...]
    values: tuple[tuple[str, Any], ...]


def load_config(overrides: Sequence[str], config_name: str = "train", *, check_files: bool | None = None) -> RunConfig:
    """The checked configuration of `<config_name>.yaml` under overrides such as `experiment=demo optim.lr=1e-3`.

    Without a `run_dir` the folder is the environment variable DYNMOE_RUN_DIR, which whatever starts several ranks must
    set, because ranks that start across the turn of a second would name two folders; else it is
    `runs/<experiment or config_name>-<date>-<time>`.

    check_files: whether to look for the files that the configuration names; None for on rank 0 alone, which reads the
    text, and makes the run folder, which it may have begun to fill when the others get here.

    Raises: ConfigError with every fault: unreadable overrides, unknown groups, options and keys, missing and wrong
    values, and combinations that cannot work.
    """
    built = load_sections(overrides, config_name)
    faults = list(built.faults)
    faults += find_faults_in(built.sections, check_files=_is_rank_zero() if check_files is None else check_files)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return built.run_config()


def load_sections(overrides: Sequence[str], config_name: str = "train") -> BuiltSections:
    """As `load_config`, but returns the faults of sections by themselves with those that are sound.

    Raises: ConfigError where nothing can be composed.
    """
    faults: list[str] = []
    parsed = _parse(overrides, faults)
    composed, choices = _compose(config_name, parsed.choices, faults)
    _apply(composed, parsed.values, faults)
    if composed.get("run_dir") is None:
        composed["run_dir"] = _default_run_dir(choices.get("experiment") or config_name, faults)
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([*faults, f"The configuration cannot be resolved: {_one_line(error)}"]) from error
    assert isinstance(plain, dict), type(plain)
    built = build_sections({str(key): value for key, value in plain.items()})
    return BuiltSections(sections=built.sections, faults=[*faults, *built.faults])


def read_config(path: str | Path) -> RunConfig:
    """The checked configuration of a file that `to_yaml` wrote, complete and with its `run_dir`.

    Raises: ConfigError for a file that cannot be read, and with every fault, as `load_config`.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration {path} cannot be read ({error.strerror}; from {Path.cwd()}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} is not YAML: {_one_line(error)}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"The configuration {path} holds no keys. `dynmoe config` prints one.")
    built = build_sections(plain)
    faults = [*built.faults, *find_faults_in(built.sections, check_files=_is_rank_zero())]
    if faults:
        raise ConfigError(faults)
    return built.run_config()


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, in the order of the schema; `build(yaml.safe_load(text))` gives it back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=120)


def to_plain(value: Any) -> Any:
    """Dataclasses as dictionaries and tuples as lists; a router gets the name of a preset of its type."""
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if not is_dataclass(value):
        return value
    items = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    return {"name": _router_name(value), **items} if isinstance(value, RouterConfig) else items


def _router_name(config: RouterConfig) -> str:
    """The preset that equals this configuration, or the first of the same type: every field is written beside it."""
    presets = {name: router_config(name) for name in router_names()}
    same = [name for name, preset in presets.items() if preset == config]
    return (same or [name for name, preset in presets.items() if type(preset) is type(config)])[0]


def _parse(overrides: Sequence[str], faults: list[str]) -> _Overrides:
    """Sort overrides into group choices and values; what cannot be read or chosen goes to `faults`."""
    groups = config_groups()
    parser = OverridesParser.create()
    choices: list[tuple[str, str]] = []
    values: list[tuple[str, Any]] = []
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException:
            faults.append(
                f"The override {text!r} cannot be read. Write GROUP=OPTION or SECTION.KEY=VALUE, with quotes around "
                "text that holds spaces or commas: 'training.sample_prompt=\"Once, \"'."
            )
            continue
        fault = _fault_of(override, groups)
        if fault is not None:
            faults.append(fault)
        elif override.key_or_group in groups:
            choices.append((override.key_or_group, str(override.value())))
        else:
            values.append((override.key_or_group, override.value()))
    return _Overrides(choices=tuple(choices), values=tuple(values))


def _fault_of(override: Override, groups: Mapping[str, tuple[str, ...]]) -> str | None:
    """What is wrong with one override by itself."""
    text, key, value = override.input_line, override.key_or_group, override.value()
    if override.is_delete():
        return f"The override {text!r} would delete a key, but every key is needed. Give it a value instead."
    if override.is_sweep_override():
        return (
            f"The override {text!r} holds several values, but one run has one. `dynmoe train --multirun` makes a run "
            "of each, and `dynmoe launch` does so on a cluster; or put quotes around text that holds a comma."
        )
    if override.package is not None:
        return f"The override {text!r} moves a group with '@', which does not work here. Write {key}=OPTION."
    if key in groups:
        options = groups[key]
        if value in options:
            return None
        if isinstance(value, dict):
            return f"{key} is a group, so give its keys one by one, as in {key}.KEY=VALUE, or choose: {_list(options)}."
        shown = "null" if value is None else value
        return f"There is no option {key}={shown}. {did_you_mean(str(shown), options)}Options: {_list(options)}."
    top_level = [field.name for field in fields(RunConfig)]
    if "." not in key and key not in top_level:
        nearest = did_you_mean(key, [*groups, *top_level])
        return f"There is no group or key {key!r}. {nearest}Groups: {_list(groups)}. Keys: seed, run_dir, SECTION.KEY."
    return None


def _compose(
    config_name: str, choices: Sequence[tuple[str, str]], faults: Sequence[str]
) -> tuple[DictConfig, dict[str, str]]:
    """The composed tree, open to new keys, and the option chosen for each group.

    Raises: ConfigError with `faults` and what Hydra says, for example of YAML that cannot be read.
    """
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            chosen = [f"{group}={option}" for group, option in choices]
            composed = compose(config_name, overrides=chosen, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([*faults, f"The configuration cannot be composed: {error}"]) from error
    OmegaConf.set_struct(composed, False)
    options = {str(group): option for group, option in composed.hydra.runtime.choices.items()}
    del composed["hydra"]
    for group, option in options.items():
        # An experiment may set keys of a section that the command line switches off: off wins.
        if option == _OFF:
            composed[group] = None
    return composed, options


def _apply(composed: DictConfig, values: Sequence[tuple[str, Any]], faults: list[str]) -> None:
    """Set values by dotted key; a key without a place is added, for the builder to report."""
    for key, value in values:
        section, dot, _ = key.partition(".")
        if dot and section in composed and composed[section] is None and section in config_groups():
            others = [option for option in config_groups()[section] if option != _OFF]
            faults.append(
                f"{key} is set, but {section}={_OFF} switches that section off. Leave {key} out, or use "
                f"{section}={' or '.join(others)}."
            )
            continue
        OmegaConf.update(composed, key, value, merge=True, force_add=True)


def _default_run_dir(run_name: str, faults: list[str]) -> str:
    """A folder for a run that names none; a fault where several ranks would each make up their own."""
    if name := os.environ.get(RUN_DIR_VARIABLE):
        return name
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        faults.append(
            f"run_dir is not set and neither is {RUN_DIR_VARIABLE}, so that every rank would choose a folder of its "
            f"own. Give run_dir=FOLDER, or export {RUN_DIR_VARIABLE} before the launcher."
        )
    return f"runs/{run_name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _list(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(names)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


register_resolvers()
