"""Slurm's way to write a duration."""

from __future__ import annotations

import math
import re

TIME_FORMATS = (
    "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS"
)

_WITHOUT_DAYS = re.compile(r"(?P<m>\d+)(:(?P<s>\d+))?|(?P<h>\d+):(?P<hm>\d+):(?P<hs>\d+)")
_WITH_DAYS = re.compile(r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?")


def seconds_of(text: str) -> float | None:
    """The seconds of a duration as `sbatch --time` reads it; infinite for `unlimited`, None where it reads nothing.

    Source: the manual page of sbatch 22.05, `--time`. 0 minutes, which mean no limit there, are refused here.
    """
    if text.lower() in ("unlimited", "infinite"):
        return math.inf
    if match := _WITH_DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(match[name] or 0) for name in "dhms")
    elif match := _WITHOUT_DAYS.fullmatch(text):
        days, hours = 0, int(match["h"] or 0)
        minutes, seconds = int(match["hm"] or match["m"] or 0), int(match["hs"] or match["s"] or 0)
    else:
        return None
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return float(total) if total else None
