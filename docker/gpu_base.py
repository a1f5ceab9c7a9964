"""What the build of the GPU image keeps of NVIDIA's PyTorch image, and whether it did.

    python3 gpu_base.py pin OURS.txt > CONSTRAINTS.txt      # before anything is installed
    python3 gpu_base.py check CONSTRAINTS.txt               # after

NVIDIA's own builds, and what they are compiled against, stay at their versions. What the base does not have comes in
the versions of OURS. The base's other packages are pip's to choose: those of transformers may have to be newer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_NVIDIAS = re.compile(r"(torch|triton|apex|transformer-engine|flash-attn|numpy)$|(nvidia|cuda|tensorrt)\b")


def canonical(name: str) -> str:
    """A package's name as pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """The version of every package that can be imported here."""
    return {canonical(one.name): one.version for one in importlib.metadata.distributions() if one.name}


def pins(base: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """The constraints for pip. A version with a local part (2.13.0a0+8145d63) is no index's, so it is NVIDIA's."""
    kept = {name: version for name, version in base.items() if "+" in version or _NVIDIAS.match(name)}
    return kept | {name: version for name, version in ours.items() if name not in base}


def read(path: Path) -> dict[str, str]:
    """The constraints of a file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def faults(wanted: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """What pip changed although it was pinned, a sentence each."""
    for name, version in wanted.items():
        if name in found and found[name] != version:
            yield f"{name} is {found[name]}, but it was to stay {version}."


def missing() -> Iterator[str]:
    """What this image is made for and does not have, a sentence each."""
    from dynmoe_ds.integrations.apex import FUSED_ADAM, FUSED_RMS_NORM, apex_class

    for fused in (FUSED_ADAM, FUSED_RMS_NORM):
        if apex_class(fused) is None:
            yield f"The base has no {fused[0]}.{fused[1]} of NVIDIA's apex, or not its extension {fused[2]}."
    if importlib.util.find_spec("transformer_engine") is None:
        yield "The base has no Transformer Engine."


def main(verb: str, path: Path) -> int:
    """Print the constraints, or what is wrong."""
    if verb == "pin":
        print("\n".join(f"{name}=={version}" for name, version in sorted(pins(installed(), read(path)).items())))
        return 0
    wrong = [*faults(read(path), installed()), *missing()]
    print("\n".join(wrong) or "torch, apex and Transformer Engine are the base's.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
