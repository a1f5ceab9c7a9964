"""`dynmoe doctor`: whether this machine has what a run needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from argparse import _SubParsersAction

# Asked for when dynmoe-ds is used without being installed; else its own list of requirements is.
_PACKAGES = (
    "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "hydra-core", "omegaconf", "wandb",
    "matplotlib",
)  # fmt: skip
# As torch calls them: of x86, then of Arm.
_BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
# No compilation of DeepSpeed's operators takes this long.
_STALE_AFTER_S = 15 * 60


_EXAMPLES = """examples:
  dynmoe doctor
  dynmoe doctor experiment=image_vit_small data.path=images
  dynmoe doctor experiment=moe_llava_phi model.text_pretrained=phi-2 projector:data.path=captions.json ...
  dynmoe doctor experiment=moe_llava_phi model.text_pretrained=phi-2 ... stage=projector
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report: `missing` makes the verb fail, `note` does not."""

    state: Literal["ok", "note", "missing"]
    subject: str
    text: str


def add_verb(verbs: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command's parser."""
    parser = verbs.add_parser(
        "doctor",
        help="check that this machine has what a run needs",
        description="Check versions, accelerator, communication backends and left-over locks; with overrides also "
        "whether the run they describe has its weights and data. Ends with exit code 1 when something is missing. "
        "Compiles the functions for CPUs; nothing else is changed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of `dynmoe train` or `dynmoe stages`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 1 when something needed is missing."""
    findings = [
        *package_findings(),
        *device_findings(),
        bfloat16_finding(),
        compiler_finding(),
        *integration_findings(),
        *lock_findings(extensions_folder()),
    ]
    if arguments.overrides:
        from dynmoe_ds.cli.doctor_of_runs import run_findings

        findings += run_findings(arguments.overrides)
    for finding in findings:
        print(f"{finding.state:<8} {finding.subject:<20} {finding.text}")
    missing = list(dict.fromkeys(finding.subject for finding in findings if finding.state == "missing"))
    print(f"\nMissing: {', '.join(missing)}." if missing else "\nEverything a run needs is here.")
    return 1 if missing else 0


def package_findings() -> Iterator[Finding]:
    """Python and the packages a run needs, against the versions that dynmoe-ds asks for."""
    from packaging.requirements import Requirement

    yield Finding(state="ok", subject="python", text=sys.version.split()[0])
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("dynmoe-ds") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(state="note", subject="dynmoe-ds", text="not installed; run `pip install -e .` to check versions")
        requirements = [Requirement(name) for name in _PACKAGES]
    for requirement in requirements:
        if requirement.marker is not None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(state="missing", subject=requirement.name, text=f"run `pip install '{requirement}'`")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(state="ok", subject=requirement.name, text=version)
        else:
            yield Finding(
                state="missing", subject=requirement.name, text=f"{version}, but run `pip install '{requirement}'`"
            )


def device_findings() -> Iterator[Finding]:
    """The accelerator as DeepSpeed sees it, and the backends of torch.distributed."""
    import torch
    from torch import distributed

    script = "from deepspeed.accelerator import get_accelerator as a; print(a().device_name(), a().device_count())"
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    last = (asked.stdout if asked.returncode == 0 else asked.stderr).strip().splitlines()[-1:] or ["no answer"]
    state: Literal["ok", "missing"] = "ok" if asked.returncode == 0 else "missing"
    text = f"{last[0]} (as deepspeed sees it)" if state == "ok" else f"deepspeed cannot be imported: {last[0]}"
    yield Finding(state=state, subject="accelerator", text=text)
    has_gpu = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if has_gpu else 0):
        properties = torch.cuda.get_device_properties(index)
        memory_gib = properties.total_memory / 2**30
        yield Finding(state="ok", subject=f"gpu {index}", text=f"{properties.name}, {memory_gib:.0f} GiB")
    has_gloo = distributed.is_available() and distributed.is_gloo_available()
    has_nccl = distributed.is_available() and distributed.is_nccl_available()
    yield _backend("gloo", has_gloo, "ranks on CPU talk through it", needed=not has_gpu)
    yield _backend("nccl", has_nccl, "ranks on GPUs talk through it", needed=has_gpu)


def bfloat16_finding() -> Finding:
    """Whether the CPU has arithmetic for parallel.dtype=bfloat16."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    if found := [name for name in _BFLOAT16_INSTRUCTIONS if capabilities.get(name)]:
        return Finding(state="ok", subject="bfloat16 on the CPU", text=f"in hardware ({', '.join(found)})")
    text = (
        f"this processor has no arithmetic for it ({', '.join(_BFLOAT16_INSTRUCTIONS)}): torch converts it to float32 "
        "and back, so on the CPU parallel.dtype=float32 is the faster one"
    )
    return Finding(state="note", subject="bfloat16 on the CPU", text=text)


def compiler_finding() -> Finding:
    """Whether experts and scores on a CPU are computed by functions that are compiled on it."""
    from dynmoe_kernels.cpu.torch_cpu import obstacle

    reason = obstacle()
    if reason is None:
        return Finding(state="ok", subject="c++ compiler", text="functions for CPUs are compiled")
    return Finding(state="note", subject="c++ compiler", text=f"{reason} On CPUs layers are slower without it.")


def _backend(name: str, is_there: bool, use: str, *, needed: bool) -> Finding:
    if is_there:
        return Finding(state="ok", subject=name, text="available")
    text = f"not in this build of torch; {use}" + ("" if needed else ", which this machine does not need")
    return Finding(state="missing" if needed else "note", subject=name, text=text)


def integration_findings() -> Iterator[Finding]:
    """Frameworks that dynmoe-ds can work beside and never needs."""
    from dynmoe_ds.integrations.apex import find_apex
    from dynmoe_ds.integrations.megatron import DISTRIBUTION, find_megatron

    apex = find_apex()
    if apex == "stranger":
        text = "a package called apex is installed that is not NVIDIA's; run `pip uninstall apex`"
        yield Finding(state="note", subject="apex", text=text)
    else:
        text = "not installed; optional" if apex == "absent" else "apex.optimizers.FusedAdam is available"
        yield Finding(state="ok", subject="apex", text=text)
    yield Finding(state="ok", subject=DISTRIBUTION, text=find_megatron() or "not installed; optional")


def extensions_folder() -> Path:
    """Where torch compiles extensions."""
    default = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def lock_findings(folder: Path) -> Iterator[Finding]:
    """Locks that a killed compilation left behind; torch would wait for them without a word and without an end."""
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    if not locks:
        yield Finding(state="ok", subject="torch extensions", text="no locks")
    for lock in locks:
        age_s = time.time() - lock.stat().st_mtime
        text = f"locked for {age_s / 60:.0f} minutes by {lock}"
        if age_s > _STALE_AFTER_S:
            yield Finding(
                state="note", subject="torch extensions", text=f"{text}; if nothing compiles, run `rm {lock}`"
            )
        else:
            yield Finding(state="ok", subject="torch extensions", text=f"{text}, probably a compilation in progress")
