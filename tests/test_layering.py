"""Imports go one way: from the measuring of models down to the mathematics of positions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pe_swap"

# From the ground up. A room imports from rooms before it, and from itself where it is a folder.
ROOMS = (
    "version",
    "errors",
    "registry",
    "positions",
    "rope_frequencies",
    "schemes",
    "adapters",
    "positional",
    "placement",
    "attention",
    "specification",
    "install",
    "model_card",
    "peft_families",
    "checkpoint",
    "swap",
    "legacy",
    "checks",
    "__init__",
    "config",
    "data",
    "records",
    "models",
    "evaluation.bootstrap",
    "evaluation.losses",
    "evaluation.masked",
    "evaluation.protocols",
    "evaluation.runner",
    "report",
    "evaluation.suite",
    "position_sampling",
    "training_loss",
    "training",
    "compare",
    "benchmark",
    "gallery",
    "__main__",
)

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts if parts[-1] != "__init__" or len(parts) == 1 else parts[:-1])


def room_of(module: str) -> str:
    return module if module in ROOMS else module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """Return every module a file imports, also inside functions; imports for type checking only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "pe_swap" else {node.module}
    return found


def test_every_module_has_a_room() -> None:
    rooms = {room_of(name_of(path)) for path in MODULES} - {"evaluation"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    room = room_of(name_of(path))
    allowed = {room, *(ROOMS[: ROOMS.index(room)] if room in ROOMS else ())}
    for imported in imports_of(path):
        if imported.split(".")[0] == "pe_swap":
            inner = imported.removeprefix("pe_swap").lstrip(".") or "__init__"
            assert room_of(inner) in allowed, f"pe_swap.{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).startswith("schemes")], ids=name_of)
def test_schemes_know_nothing_of_transformers(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] in ("transformers", "accelerate", "datasets")}


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_only_read_a_command_line(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} == {"main"}
    assert all(name.split(".")[0] in ("pe_swap", "collections") for name in imports_of(path))
