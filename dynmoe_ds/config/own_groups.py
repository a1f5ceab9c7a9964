"""Groups that are no part of a run but of one verb: their overrides, and their options under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dynmoe_ds.config.groups import CONFIG_MODULE, did_you_mean
from dynmoe_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitOverrides:
    """`own` (key, value) pairs of a verb's own groups in the order given, `others` as they were, and `faults`."""

    own: tuple[tuple[str, Any], ...]
    others: tuple[str, ...]
    faults: tuple[str, ...]


def split_overrides(overrides: Sequence[str], rooms: Sequence[str]) -> SplitOverrides:
    """Take from overrides those that begin with one of `rooms`, as in `cluster=local_cpu cluster.num_nodes=2`."""
    own: list[tuple[str, Any]] = []
    others: list[str] = []
    faults: list[str] = []
    parser = OverridesParser.create()
    for text in overrides:
        room = text.lstrip("+").partition("=")[0].partition(".")[0]
        if room not in rooms:
            others.append(text)
            continue
        try:
            (override,) = parser.parse_overrides([text])
            if override.is_delete() or override.is_sweep_override():
                raise HydraException("neither deleted nor swept")
        except HydraException:
            faults.append(
                f"The override {text!r} cannot be read. Write {room}.KEY=VALUE with one value, and quotes around text "
                f"""that holds '=', spaces or commas, as in {room}.KEY='"a=b"'."""
            )
            continue
        own.append((override.key_or_group, override.value()))
    return SplitOverrides(own=tuple(own), others=tuple(others), faults=tuple(faults))


def read_option(group: str, name: str, names: Sequence[str], values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The YAML of the option `name` with `values` by dotted key, such as ("within_node.latency_s", 1e-5).

    A name that ends with `.yaml` is a file of the user's own.

    Raises: ConfigError with every fault: an unknown name or file, and keys below something that is no section.
    """
    if name.endswith(".yaml"):
        plain = _read_file(Path(name), group)
    elif name in names:
        plain = yaml.safe_load((files(CONFIG_MODULE) / group / f"{name}.yaml").read_text(encoding="utf-8"))
    else:
        raise ConfigError(f"There is no option {group}={name}. {did_you_mean(name, names)}Options: {', '.join(names)}.")
    faults = []
    for key, value in values:
        *path, last = key.split(".")
        section: Any = plain
        for part in path:
            if isinstance(section, dict) and section.get(part) is None:
                section[part] = {}  # a section that the file does not know
            section = section[part] if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = value
        else:
            faults.append(f"{group}.{key} cannot be set: {'.'.join([group, *path])} is not a section.")
    if faults:
        raise ConfigError(faults)
    return plain


def _read_file(path: Path, group: str) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{group}={path} cannot be read ({error.strerror}; from {Path.cwd()}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{group}={path} is not YAML: {' '.join(f'{error}'.split())}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{group}={path} holds no keys. Copy a file of configs/{group}/ and change it.")
    return plain
