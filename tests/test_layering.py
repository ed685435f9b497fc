"""Imports go one way: from the commands down to the mathematics of positions. Rooms are folders, and single files on top."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pe_swap.schemes import SCHEMES
from tests.support.floors import FLOORS

PACKAGE = Path(__file__).parents[1] / "pe_swap"
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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_is_hidden_from_the_program(path: Path) -> None:
    assert "TYPE_CHECKING" not in path.read_text(encoding="utf-8"), "a circle: move what both need into a file of its own"


def test_no_file_imports_a_test_module() -> None:
    """A test module may be edited, split and run without a thought of others; what several of them need stands in a file of its own."""
    tests = Path(__file__).parent
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
                named = {*str(node.module).split("."), *(alias.name for alias in node.names)}
                assert not any(name.startswith("test_") for name in named), f"{path.relative_to(tests)} imports {node.module}"


def registers(path: Path) -> bool:
    """Tell whether a file has a scheme in it."""
    return "@SCHEMES.register(" in path.read_text(encoding="utf-8")


SCHEME_FILES = {f"pe_swap.schemes.{path.stem}": path for path in MODULES if room_of(path) == "schemes" and registers(path)}


def test_the_files_of_schemes_are_found() -> None:
    assert len(SCHEME_FILES) == len(SCHEMES.names()) > 20


@pytest.mark.parametrize("module", SCHEME_FILES, ids=lambda name: name.rsplit(".")[-1])
def test_a_scheme_s_file_imports_no_other_scheme_s(module: str) -> None:
    assert not imports_of(SCHEME_FILES[module]) & SCHEME_FILES.keys(), "what two schemes share stands in a file without a scheme"


@pytest.mark.parametrize("path", SCHEME_FILES.values(), ids=lambda path: path.stem)
def test_a_scheme_s_file_reads_formula_options_scheme_and_then_what_is_only_faster(path: Path) -> None:
    """One order everywhere: formulas, given and resolved options, the scheme, a ruler, its faster form."""
    text = path.read_text(encoding="utf-8")
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    kinds = ["options" if "Options" in node.name else "fast" if node.name.startswith("Fast") else "scheme" for node in classes]
    kinds = [kind for kind, node in zip(kinds, classes, strict=True) if node.name != "Prepared"]
    assert kinds in (
        ["options", "scheme"],
        ["options", "options", "scheme"],
        ["options", "scheme", "fast"],
        ["options", "options", "scheme", "fast"],
    )
    ruler = "\n# --- Faster forms of the same numbers ---\n"
    assert text.count(ruler) == ("fast" in kinds)
    if "fast" in kinds:
        scheme = next(node.name for node in classes if node.name == f"Fast{classes[kinds.index('scheme')].name}")
        assert text.index(f"class {scheme.removeprefix('Fast')}(") < text.index(ruler) < text.index(f"class {scheme}(")
        assert "def prepare(" not in text[: text.index(ruler)]
    assert ("def fold_bias_into_query_key(" in text) <= ("fast" in kinds)
