"""Sentences about numbers out of their bounds."""

from __future__ import annotations

from collections.abc import Iterator


def at_least(section: str, values: object, least: int, *names: str) -> Iterator[str]:
    """A fault for each of the named values of `section` that is below `least`."""
    for name in names:
        value = getattr(values, name)
        if value < least:
            yield f"{section}.{name} is {value} but must be at least {least}."


def multiple(name: str, value: int, of: str, base: int) -> Iterator[str]:
    """A fault unless `value` is a multiple of `base`, with the nearest values that are."""
    if base >= 1 and value >= 1 and value % base:
        below, above = value // base * base, (value // base + 1) * base
        nearest = f"{below} or {above}" if below else f"{above}"
        yield f"{name} is {value} but must be a multiple of {of}. Use {nearest}."
