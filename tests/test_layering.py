"""Imports go one way: from the commands down to the mathematics of positions. Rooms are folders, and single files on top."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pe_swap"

FLOORS = (
    {"version", "errors"},
    {"registry"},
    {"schemes"},
    {"families", "attention", "assignment"},
    {"patching"},
    {"saving"},
    {"swap"},
    {"checks"},
    {"__init__"},
    {"runs"},
    {"evaluation"},
    {"training"},
    {"commands"},
    {"__main__"},
)
"""From the ground up. A room imports from itself and from the floors below it, never from its own floor."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Return every module a file imports, also inside functions and for type checking only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "pe_swap" else {node.module}
    return found


def test_every_room_has_a_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted({room_of(path) for path in MODULES})


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    floor = next(index for index, rooms in enumerate(FLOORS) if room in rooms)
    allowed = {room}.union(*FLOORS[:floor])
    for imported in imports_of(path):
        if imported.split(".")[0] == "pe_swap":
            target = [*imported.split("."), "__init__"][1]
            assert target in allowed, f"{path.relative_to(PACKAGE)} imports {imported}"


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) == "schemes"], ids=name_of)
def test_schemes_know_nothing_of_transformers(path: Path) -> None:
    outside = {name for name in imports_of(path) if name.split(".")[0] in ("transformers", "accelerate", "datasets")}
    if path.stem == "hf_rope":  # frequencies of the rope types, by transformers' own formulas
        assert outside == {"transformers.modeling_rope_utils"}
    else:
        assert not outside


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_only_read_a_command_line(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} == {"main"}
    assert all(name.split(".")[0] in ("pe_swap", "collections") for name in imports_of(path))
