"""Compiles the C++ sources beside this file, once per machine, and loads them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
SOURCES = sorted(_FOLDER.glob("*.cpp"))
_HEADERS = sorted(_FOLDER.glob("*.h"))

# None of these lets the compiler forget NaN or infinity.
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-std=c++17",
    "-fPIC",
    "-shared",
)
_X86_FLAGS = ("-mprefer-vector-width=512",)
_TIMEOUT_S = 120

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had, for which `obstacle` has the reason."""
    found = _load()
    if isinstance(found, str):
        logger.warning("%s Plain torch computes on this CPU, more slowly.", found)
        return None
    return found


def obstacle() -> str | None:
    """A sentence that says why there are no compiled functions; None if there are."""
    found = _load()
    return found if isinstance(found, str) else None


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or a sentence that says why there is none.

    The file is kept in `$XDG_CACHE_HOME/dynmoe_ds` (`~/.cache`), under a name that changes with the sources, the
    compiler and the processor. Several processes may compile at once: the file appears by a rename.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++")), None)
    if compiler is None:
        return "There is no C++ compiler (g++)."
    try:
        return ctypes.CDLL(str(_compiled(shlex.split(compiler))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        told = str(getattr(error, "stderr", None) or error).strip()
        return f"The functions for CPUs cannot be compiled by {compiler}: {told[:500]}."


def _compiled(compiler: list[str]) -> Path:
    """The path of the compiled library. Raises: OSError or subprocess.SubprocessError if it cannot be made."""
    told = _run([*compiler, "--version"])
    flags = [*FLAGS, *(_X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())]
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *_HEADERS)]
    key = "\n".join([*texts, told, *flags, _processor()])
    name = f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynmoe_ds"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / name
            _run([*compiler, *flags, *map(str, SOURCES), "-o", str(made)])
            made.replace(folder / name)
    return folder / name


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    decisive = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(decisive)}))
