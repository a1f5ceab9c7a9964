"""Plain dictionaries to the frozen dataclasses of a run, strictly: nothing is guessed, and every fault is collected."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from dynmoe_ds.config.groups import did_you_mean
from dynmoe_ds.config.schema import RunConfig
from dynmoe_ds.errors import ConfigError
from dynmoe_ds.routing import RouterConfig, router_config, router_names

_TYPE_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a section",
    list: "a list",
    type(None): "null",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltSections:
    """What could be built: `sections` by name (a section with a wrong or missing value is absent) and all `faults`."""

    sections: dict[str, Any]
    faults: list[str]

    def run_config(self) -> RunConfig:
        """The whole configuration.

        Raises: ConfigError with every fault.
        """
        if self.faults:
            raise ConfigError(self.faults)
        return RunConfig(**self.sections)


def build(plain: Mapping[str, Any]) -> RunConfig:
    """The configuration that a plain dictionary (YAML, JSON) describes.

    Values keep their types, except that a whole number is welcome where a number is wanted and a list where a tuple is.
    The router section is `{name: <registered name>, <field>: <value>, ...}`: the preset's values, then the given ones.
    Where a section may be of several kinds (model, data), its `name` chooses the kind.

    Raises: ConfigError with every unknown key, missing key, wrong type and value that its section refuses.
    """
    return build_sections(plain).run_config()


def build_router_config(plain: Mapping[str, Any]) -> RouterConfig:
    """The router's configuration that a router section describes.

    Raises: ConfigError with every fault, as `build`.
    """
    faults: list[str] = []
    router = _router(plain, "router", faults)
    if faults:
        raise ConfigError(faults)
    assert isinstance(router, RouterConfig), router
    return router


S = TypeVar("S")


def build_section(cls: type[S], plain: Mapping[str, Any], path: str) -> S:
    """The dataclass `cls` that a plain dictionary describes, as strictly as `build`; faults begin with `path`.

    Raises: ConfigError with every fault.
    """
    section, faults = build_what_can_be(cls, plain, path)
    if faults:
        raise ConfigError(faults)
    assert section is not None, path
    return section


def build_what_can_be(cls: type[S], plain: Mapping[str, Any], path: str) -> tuple[S | None, list[str]]:
    """As `build_section`, but returns the faults with the dataclass, None where a value cannot be converted."""
    faults: list[str] = []
    section = _section(plain, cls, path, faults)
    return section if isinstance(section, cls) else None, faults


def build_sections(plain: Mapping[str, Any]) -> BuiltSections:
    """As `build`, but returns the faults with the sections that are sound, so that these can be validated too."""
    faults: list[str] = []
    sections = _fields_of(RunConfig, plain, "", faults)
    return BuiltSections(sections=sections, faults=faults)


class _Refused:
    """What a conversion returns when it has added a fault."""


_REFUSED = _Refused()


def _fields_of(cls: type, plain: Mapping[str, Any], path: str, faults: list[str]) -> dict[str, Any]:
    """The values of a dataclass that could be converted, by field name; what is missing or wrong goes to `faults`."""
    hints = typing.get_type_hints(cls)
    _report_unknown(plain, list(hints), path, faults)
    values: dict[str, Any] = {}
    for field in fields(cls):
        name = _join(path, field.name)
        if field.name not in plain:
            if field.default is MISSING and field.default_factory is MISSING:
                faults.append(f"{name} is missing. Give it {expected(hints[field.name])}.")
            continue
        value = _convert(plain[field.name], hints[field.name], name, faults)
        if value is not _REFUSED:
            values[field.name] = value
    return values


def _report_unknown(plain: Mapping[str, Any], known: list[str], path: str, faults: list[str]) -> None:
    """One fault per key that no field has, with the nearest known key."""
    for key in plain:
        if key not in known:
            advice = did_you_mean(str(key), known, path) or f"The keys there are {', '.join(known)}."
            faults.append(f"There is no key {_join(path, str(key))!r}. {advice}".rstrip())


def _convert(value: Any, hint: Any, path: str, faults: list[str]) -> Any:
    """The value as its type hint wants it, or `_REFUSED` with a fault added."""
    if hint is RouterConfig:
        return _router(value, path, faults)
    if kinds := _kinds(hint):
        return _section_of_a_kind(value, kinds, path, faults)
    if is_dataclass(hint):
        assert isinstance(hint, type), hint
        return _section(value, hint, path, faults)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        members = [argument for argument in arguments if argument is not type(None)]
        if len(members) == 1:
            return _convert(value, members[0], path, faults)
        # Words or a list: told apart by what is given.
        is_list = isinstance(value, list | tuple)
        (inner,) = (member for member in members if (typing.get_origin(member) is tuple) == is_list)
        (other,) = (member for member in members if member is not inner)
        converted = _convert(value, inner, path, faults)
        if converted is _REFUSED:
            faults[-1] += f" Or give {expected(other)}."
        return converted
    if origin is tuple and isinstance(value, list | tuple):
        items = [_convert(item, arguments[0], f"{path}[{index}]", faults) for index, item in enumerate(value)]
        return _REFUSED if _REFUSED in items else tuple(items)
    if origin is Literal:
        # Compared with the type: 1 == True in Python, but not in a configuration.
        if any(value == allowed and type(value) is type(allowed) for allowed in arguments):
            return value
        nearest = did_you_mean(value, arguments) if isinstance(value, str) else ""
        faults.append(f"{path} is {value!r}. {nearest}Use {_either(arguments)}.")
        return _REFUSED
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        given = _TYPE_NAMES.get(type(value), type(value).__name__)
        faults.append(f"{path} is {value!r} ({given}) but must be {expected(hint)}.")
        return _REFUSED
    if hint is float and not math.isfinite(value):
        faults.append(f"{path} is {value} but must be a finite number.")
        return _REFUSED
    return value


def _kinds(hint: Any) -> dict[str, type]:
    """The dataclass behind each `name` that a section may have; empty where sections are not told apart by name."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds: dict[str, type] = {}
    for member in members:
        tag = typing.get_type_hints(member).get("name") if is_dataclass(member) else None
        if typing.get_origin(tag) is not Literal:
            return {}
        kinds |= dict.fromkeys(typing.get_args(tag), member)
    return kinds


def _section_of_a_kind(value: Any, kinds: Mapping[str, type], path: str, faults: list[str]) -> Any:
    """The dataclass that the section's name chooses, or `_REFUSED`."""
    if not isinstance(value, Mapping):
        faults.append(f"{path} is {value!r} but must be {_named_section(kinds)}.")
        return _REFUSED
    if "name" not in value:
        faults.append(f"{path}.name is missing. Give it {_either(kinds)}.")
        return _REFUSED
    name = value["name"]
    if not isinstance(name, str) or name not in kinds:
        nearest = did_you_mean(name, kinds) if isinstance(name, str) else ""
        faults.append(f"{path}.name is {name!r}. {nearest}Use {_either(kinds)}.")
        return _REFUSED
    return _section(value, kinds[name], path, faults)


def _section(value: Any, cls: type, path: str, faults: list[str]) -> Any:
    """A nested dataclass, or `_REFUSED`."""
    if not isinstance(value, Mapping):
        faults.append(f"{path} is {value!r} but must be {expected(cls)}.")
        return _REFUSED
    before = len(faults)
    values = _fields_of(cls, value, path, faults)
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    given = {f.name for f in fields(cls)} & set(value)
    if not needed | given <= set(values):
        assert len(faults) > before, f"{path} is incomplete without a fault"
        return _REFUSED
    return _made(lambda: cls(**values), faults)


def _router(value: Any, path: str, faults: list[str]) -> Any:
    """A router's configuration: the preset of that name with the given fields replaced, or `_REFUSED`."""
    if not isinstance(value, Mapping):
        faults.append(f"{path} is {value!r} but must be {expected(RouterConfig)}.")
        return _REFUSED
    name = value.get("name")
    if not isinstance(name, str) or name not in router_names():
        names = router_names()
        nearest = did_you_mean(name, names) if isinstance(name, str) else ""
        given = f"is {name!r}, which is no registered router" if "name" in value else "is missing"
        faults.append(f"{path}.name {given}. {nearest}Use {_either(names)}.")
        return _REFUSED
    preset = router_config(name)
    cls = type(preset)
    assert is_dataclass(preset), f"{cls.__name__} must be a dataclass"
    given_fields = {key: item for key, item in value.items() if key != "name"}
    hints = {field.name: typing.get_type_hints(cls)[field.name] for field in fields(preset)}
    _report_unknown(given_fields, list(hints), path, faults)
    values = {
        key: _convert(item, hints[key], _join(path, key), faults) for key, item in given_fields.items() if key in hints
    }
    if _REFUSED in values.values():
        return _REFUSED
    return _made(lambda: replace(preset, **values), faults)


def _made(make: typing.Callable[[], Any], faults: list[str]) -> Any:
    """The object that `make` returns, with its own `faults()` collected; `_REFUSED` when it cannot even be made."""
    try:
        made = make()
    except ConfigError as error:
        faults.extend(error.faults)
        return _REFUSED
    if hasattr(made, "faults"):
        faults.extend(made.faults())
    return made


def expected(hint: Any) -> str:
    """What a user must give, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is RouterConfig:
        return _named_section(router_names())
    if kinds := _kinds(hint):
        return _named_section(kinds)
    if is_dataclass(hint):
        return f"a section with the keys {', '.join(f.name for f in fields(hint))}"
    if origin is Literal:
        return _either(arguments)
    if origin is tuple:
        return "a list"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(argument) for argument in arguments)
    return _TYPE_NAMES.get(hint, str(hint))


def _named_section(names: typing.Iterable[str]) -> str:
    return f"a section with a name ({_either(names)})"


def _either(words: typing.Iterable[Any]) -> str:
    """`a, b or c`."""
    *first, last = (str(word) for word in words)
    return f"{', '.join(first)} or {last}" if first else last


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
