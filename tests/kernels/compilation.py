"""Kernels compiled for GPUs that need not be there, and what the machine code asks of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A GPU to compile for, and the shared memory that one program may have; Triton itself does not check it."""

    gpu: GPUTarget
    shared_limit: int

    @property
    def is_nvidia(self) -> bool:
        return self.gpu.backend == "cuda"

    @property
    def lanes(self) -> int:
        return self.gpu.warp_size


# Source: CUDA C++ Programming Guide, technical specifications per compute capability; AMD CDNA 3 ISA guide (LDS).
TARGETS = {
    "sm_80": Target(gpu=GPUTarget("cuda", 80, 32), shared_limit=163 << 10),
    "sm_90": Target(gpu=GPUTarget("cuda", 90, 32), shared_limit=227 << 10),
    "sm_100": Target(gpu=GPUTarget("cuda", 100, 32), shared_limit=227 << 10),
    "gfx942": Target(gpu=GPUTarget("hip", "gfx942", 64), shared_limit=64 << 10),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """One way to compile a kernel.

    types: of every parameter but the constants. Integers that are in `ones` are 1, for which Triton builds a kernel of
    its own; those in `multiples` are, like all pointers, multiples of 16.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    multiples: Sequence[str] = ()
    ones: Sequence[str] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a compiled kernel asks for: registers per thread, spilled bytes (on AMD: registers), shared bytes."""

    registers: int
    spills: int
    shared: int
    assembly: str


def compiled(build: Build, target: Target) -> Machine:
    """The kernel as the target's machine would run it."""
    names = build.kernel.arg_names
    constants = dict(build.constants) | dict.fromkeys(build.ones, 1)
    assert set(build.types) | set(constants) == set(names), set(names) ^ (set(build.types) | set(constants))
    aligned = [n for n in names if n not in constants and (build.types[n][0] == "*" or n in build.multiples)]
    source = ASTSource(
        fn=build.kernel,
        signature={name: "constexpr" if name in constants else build.types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    binary = triton.compile(source, target=target.gpu, options={"num_warps": build.num_warps})
    shared = binary.metadata.shared
    if target.is_nvidia:
        assembly = binary.asm["ptx"]
        registers, spills = _ptxas_report(assembly, target.gpu.arch)
    else:
        assembly = binary.asm["amdgcn"]
        registers = _amd_count("vgpr_count", assembly)
        spills = _amd_count("vgpr_spill_count", assembly) + _amd_count("sgpr_spill_count", assembly)
    return Machine(registers=registers, spills=spills, shared=shared, assembly=assembly)


def faults(machine: Machine, target: Target, instructions: Sequence[str]) -> list[str]:
    """One sentence for everything that would keep the kernel from running, or from running fast."""
    found = []
    if machine.spills:
        found.append(f"{machine.spills} spilled: its blocks are too large for {machine.registers} registers.")
    if machine.shared > target.shared_limit:
        found.append(f"{machine.shared} bytes of shared memory are more than {target.shared_limit}.")
    for pattern in instructions:
        if not re.search(pattern, machine.assembly):
            found.append(f"no instruction like {pattern}.")
    return found


def _ptxas_report(assembly: str, arch: int) -> tuple[int, int]:
    name = f"sm_{arch}" + ("a" if arch >= 90 else "")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(assembly)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers and spilled, report
    return int(registers[1]), int(spilled[1]) + int(spilled[2])


def _amd_count(name: str, assembly: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert found, f"the assembly does not tell {name}"
    return int(found[1])
