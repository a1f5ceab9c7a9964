"""The rooms of the house: who may import whom."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "dynmoe_ds"

# A room may import from rooms further down only. docs/decisions.md says why engine and config stand where they do.
LEVELS = [
    {"cli"},
    {"harness"},
    {"training"},
    {"export", "launching", "planning"},
    {"data", "models", "telemetry"},
    {"config"},
    {"engine"},
    {"checkpoint"},
    {"adaptation"},
    {"integrations"},
    {"moe"},
    {"dispatch"},
    {"experts", "routing"},
    {"distributed"},
    {"errors"},
]
LEVEL = {room: height for height, rooms in enumerate(reversed(LEVELS)) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, list[str], bool]]:
    """(module, names, whether at import time) of every import but those for type checkers."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, list[str], bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, [], at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                yield child.module or "", [alias.name for alias in child.names], at_import
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, at_import and not inside)

    yield from walk(ast.parse(path.read_text()), True)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "dynmoe_ds" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_rooms_import_downwards_only(path: Path) -> None:
    room = room_of(module_name(path))
    if room is None or room == "__main__":
        return  # the package's own face may look into every room
    for module, names, _ in imports(path):
        for target in {room_of(module)} | (
            {room_of(f"dynmoe_ds.{name}") for name in names} if module == "dynmoe_ds" else set()
        ):
            if target is not None and target != room:
                assert target in LEVEL, f"{path} imports {module}, which is in no room"
                assert LEVEL[target] < LEVEL[room], f"{path} ({room}) imports {module} ({target})"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    is_deepspeed = any(module.split(".")[0] == "deepspeed" for module, _, _ in imports(path))
    assert not is_deepspeed or room_of(module_name(path)) == "engine", path


def test_there_is_no_cycle_of_imports() -> None:
    modules = {module_name(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        name = module_name(path)
        targets = set()
        for module, names, at_import in imports(path):
            if at_import:
                submodules = {f"{module}.{n}" for n in names} & modules
                targets |= submodules or ({module} & modules)
        # A package's face imports its modules; that its modules import one another through it would be a cycle.
        graph[name] = targets - {name}
    TopologicalSorter(graph).prepare()


def test_every_room_is_known() -> None:
    rooms = {room_of(module_name(path)) for path in FILES} - {None, "__main__"}
    assert rooms == set(LEVEL)


def test_an_ordinary_installation_holds_every_package() -> None:
    root = ROOT.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    code = {module_name(path) for path in FILES if path.name == "__init__.py"}
    configs = {f"dynmoe_configs.{path.parent.name}" for path in root.glob("configs/*/*.yaml")}
    kernels = {f"dynmoe_{module_name(path)}" for path in root.glob("kernels/**/__init__.py")}
    assert set(listed) == code | configs | kernels | {"dynmoe_configs"}
