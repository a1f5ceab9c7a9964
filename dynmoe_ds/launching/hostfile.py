"""DeepSpeed's list of hosts."""

from __future__ import annotations

import re
from pathlib import Path

_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")


def read_hostfile(path: Path) -> tuple[dict[str, int], list[str]]:
    """The slots of each host in the file's order, and what is wrong with it. Empty lines and `# ...` do not count."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return {}, [f"launch.hostfile is {f'{path}'!r}, which cannot be read ({error.strerror}; from {Path.cwd()})."]
    hosts: dict[str, int] = {}
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        match = _LINE.fullmatch(content)
        if match is None or int(match["slots"]) < 1:
            if content:
                faults.append(f"{path}, line {number} is {line.strip()!r}. Write `HOST slots=RANKS`, at least 1.")
        elif match["host"] in hosts:
            faults.append(f"{path}, line {number} names {match['host']} again. Give each host one line.")
        else:
            hosts[match["host"]] = int(match["slots"])
    if not hosts and not faults:
        faults.append(f"{path} names no host. Write a line `HOST slots=RANKS` for every host.")
    return hosts, faults
