"""The page docs/configuration.md: every key of runs, launches and plans, from the schema and the committed files.

python -m dynmoe_ds.cli.config_page > docs/configuration.md
"""

from __future__ import annotations

import inspect
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from dynmoe_ds.cli.launcher import name_accelerator
from dynmoe_ds.cli.plan import DEFAULT_CLUSTER, PLAN_KEYS
from dynmoe_ds.config.build import expected
from dynmoe_ds.config.groups import (
    CLUSTER_GROUP,
    CONFIG_MODULE,
    LAUNCH_GROUP,
    cluster_names,
    config_groups,
    launch_names,
)
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.launching.config import AnyLaunchConfig
from dynmoe_ds.routing import RouterConfig, router_config, router_names

_HEAD = """# Configuration

Every key of a run and, at the end, of `dynmoe launch` and `dynmoe plan`. Written by
`python -m dynmoe_ds.cli.config_page` from the schema (`dynmoe_ds/config/schema.py`, `routing/`, `adaptation/config.py`,
`launching/config.py`, `planning/cluster.py`) and the files in `configs/`; a test fails when it is not current.

`GROUP=OPTION` takes a file, such as `router=top_p` for `configs/router/top_p.yaml`; `SECTION.KEY=VALUE` sets a value;
`dynmoe config OVERRIDES` prints what comes out. An experiment is a set of such choices. A key without a default must be
given by a file or on the command line. **In the files** is what the options of the group set, where one of them sets
it: `option: value`, in bold the option that is taken without any choice, and `others` where all that are not named
agree.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A file of a group: its name, its comment on top, the kind of section that it is, its own keys."""

    name: str
    comment: str
    kind: str | None = None
    values: Mapping[str, Any]


def config_page() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_experiments(), *_top_level(), *_sections(), *_plan()]) + "\n"


def _experiments() -> Iterator[str]:
    yield "## experiment"
    yield ""
    for option in _options("experiment"):
        yield f"- `experiment={option.name}`: {option.comment}"
    yield ""


def _top_level() -> Iterator[str]:
    yield "## Without a section"
    yield ""
    yield from _head("key", "type", "default")
    hints = typing.get_type_hints(RunConfig)
    train = yaml.safe_load((files(CONFIG_MODULE) / "train.yaml").read_text(encoding="utf-8"))
    for field in fields(RunConfig):
        if not _classes(hints[field.name]):
            shown = "`runs/<experiment>-<date>-<time>`" if train[field.name] is None else _shown(train[field.name])
            yield _row(f"`{field.name}`", expected(hints[field.name]), shown)
    yield ""


def _sections() -> Iterator[str]:
    from dynmoe_ds.planning.cluster import Cluster

    hints = typing.get_type_hints(RunConfig)
    for field in fields(RunConfig):
        if classes := _classes(hints[field.name]):
            yield from _section(field.name, classes)
    yield from _section(LAUNCH_GROUP, _classes(AnyLaunchConfig))
    yield from _section(CLUSTER_GROUP, [Cluster])


def _plan() -> Iterator[str]:
    """What is the verb's own, beside the cluster."""
    yield "## plan"
    yield ""
    yield from _head("key", "meaning")
    for key, meaning in PLAN_KEYS.items():
        yield _row(f"`plan.{key}`", meaning)
    yield ""


def _section(name: str, classes: list[type]) -> Iterator[str]:
    options = _options(name)
    yield f"## {name}"
    yield ""
    for option in options:
        yield f"- `{name}={option.name}`: {option.comment}"
    yield ""
    for cls in classes:
        of_class = [option for option in options if len(classes) == 1 or _is_of(option, cls)]
        if len(classes) > 1:
            yield f"### {name}: {', '.join(f'`{one}`' for one in _names(cls))}"
            yield ""
        yield _told(cls)
        yield ""
        yield from _head("key", "type", "default", "in the files")
        yield from _rows(cls, f"{name}.", [option for option in of_class if option.values])
        yield ""


def _classes(hint: Any) -> list[type]:
    """The dataclasses that a section may be; none for a plain value."""
    if hint is RouterConfig:
        return list(dict.fromkeys(type(router_config(name)) for name in router_names()))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [cls for argument in typing.get_args(hint) for cls in _classes(argument)]
    return [hint] if isinstance(hint, type) and is_dataclass(hint) else []


def _names(cls: type) -> list[str]:
    """The values of `name` that choose a class."""
    if issubclass(cls, RouterConfig):
        return [name for name in router_names() if type(router_config(name)) is cls]
    return list(typing.get_args(typing.get_type_hints(cls)["name"]))


def _is_of(option: Option, cls: type) -> bool:
    return option.kind in _names(cls)


def _rows(cls: type, prefix: str, options: list[Option]) -> Iterator[str]:
    """A row for each key, those of sections within sections after them."""
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if field.name == "name" and typing.get_origin(hints["name"]) is Literal:
            continue  # in the heading
        name, hint = f"{prefix}{field.name}", hints[field.name]
        inner = _classes(hint)
        yield _row(
            f"`{name}`", "a section" if inner else expected(hint), _default(field), _in_files(field.name, options)
        )
        for section in inner:
            within = [
                Option(name=option.name, comment="", values=option.values[field.name])
                for option in options
                if isinstance(option.values.get(field.name), Mapping)
            ]
            yield from _rows(section, f"{name}.", within)


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return "a section of its defaults" if is_dataclass(field.default) else _shown(field.default)
    return "" if field.default_factory is MISSING else "a section of its defaults"


def _in_files(key: str, options: list[Option]) -> str:
    """What the files say; what most of them say last and once."""
    said = {option.name: _shown(option.values[key]) for option in options if key in option.values}
    if any(isinstance(option.values.get(key), Mapping) for option in options):
        return ""  # its keys have rows of their own
    if len(said) == len(options) > 1 and len(set(said.values())) == 1:
        return f"all: {next(iter(said.values()))}"
    commonest = max(said.values(), key=list(said.values()).count, default="")
    num_common = list(said.values()).count(commonest)
    is_folded = num_common > 2 and len(said) == len(options)
    told = [
        f"{f'**{name}**' if name in _chosen() else name}: {value}"
        for name, value in said.items()
        if not is_folded or value != commonest
    ]
    return "; ".join([*told, *([f"others: {commonest}"] if is_folded else [])])


@cache
def _chosen() -> frozenset[str]:
    """The options that are taken without any choice."""
    train = yaml.safe_load((files(CONFIG_MODULE) / "train.yaml").read_text(encoding="utf-8"))
    return frozenset({DEFAULT_CLUSTER}).union(
        option for entry in train["defaults"] if isinstance(entry, dict) for option in entry.values() if option
    )


def _options(group: str) -> list[Option]:
    of_verbs = {LAUNCH_GROUP: launch_names(), CLUSTER_GROUP: cluster_names()}
    return [_option(group, name) for name in of_verbs.get(group, config_groups().get(group, ()))]


def _option(group: str, name: str) -> Option:
    text = (files(CONFIG_MODULE) / group / f"{name}.yaml").read_text(encoding="utf-8")
    comments = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comments.append(line.removeprefix("#").strip())
    return Option(name=name, comment=" ".join(comments), kind=_kind(group, name), values=_values(group, name))


def _values(group: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((files(CONFIG_MODULE) / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return found or {}


def _kind(group: str, name: str) -> str | None:
    """`name` in the file, or in the one that it begins with."""
    values = _values(group, name)
    parents = () if group == "experiment" else values.get("defaults", ())
    kinds = [values.get("name"), *(_kind(group, parent) for parent in parents if parent != "_self_")]
    return next((kind for kind in kinds if kind is not None), None)


def _told(cls: type) -> str:
    """The class's docstring, with its lines joined to paragraphs."""
    paragraphs = (inspect.getdoc(cls) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if "`" in f"{value}":
        return f"{value}"
    return f"`{value}`" if value != "" else "empty"


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*["---"] * len(names))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    name_accelerator(os.environ)  # or DeepSpeed says here which one it has chosen
    sys.stdout.write(config_page())
