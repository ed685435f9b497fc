"""The code of every README runs, its commands exist, and its tables say what the code says. READMEs are found by scanning."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

import pe_swap
from pe_swap.__main__ import main
from pe_swap.evaluation.measures import MEASURES, chosen
from pe_swap.families import Stack
from pe_swap.runs.config import CompareConfig, MeasureSection
from pe_swap.schemes import SCHEMES, Scheme
from pe_swap.schemes.base import ATTENTION_HOOKS, INPUT_HOOKS
from tests.support.floors import FLOORS

ROOT = Path(__file__).parents[1]
ROOMS = ("pe_swap", "scripts", "configs", "tests")
READMES = [ROOT / "README.md", *sorted(path for room in ROOMS for path in (ROOT / room).rglob("README.md"))]
"""The project's own, and none of a virtual environment, a saved model or a tool beside them."""

TABLE_OF = re.compile(r"^<!-- table of: python -m pe_swap (.*?) -->\n((?:^\|.*\n)+)", flags=re.MULTILINE)
"""A table that a command prints, below a comment that names the command."""

every_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(readme: Path, language: str) -> list[str]:
    """Return the code blocks of one language, also those indented under a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text_of(readme), flags=re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in block.splitlines(keepends=True)) for indent, block in found]


def text_of(readme: Path) -> str:
    return readme.read_text(encoding="utf-8")


def room(name: str) -> str:
    """Return the README of a folder."""
    return text_of(ROOT / name / "README.md")


def cells(table_after: str, text: str) -> list[list[str]]:
    """Return the rows of the first table that follows `table_after`, header included."""
    table = re.search(r"(?:^ *\|.*\n)+", text[text.index(table_after) :], flags=re.MULTILINE)
    assert table is not None
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table[0].splitlines()]
    return [rows[0], *rows[2:]]


def names_in_first_column(table_after: str, text: str) -> list[str]:
    """Return the names in the first column, in backticks or before the bracket of a call."""
    return [re.match(r"`([\w-]+)", row[0])[1] for row in cells(table_after, text)[1:]]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A README may register a scheme; it is gone after the test."""
    monkeypatch.setattr(SCHEMES, "_entries", dict(SCHEMES._entries))


def test_every_room_has_a_readme() -> None:
    found = {str(path.parent.relative_to(ROOT)) for path in READMES}
    assert found >= {".", "pe_swap", "pe_swap/schemes", "pe_swap/families", "scripts", "configs", "tests"}


def test_the_first_page_is_one_page() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@every_readme
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.usefixtures("registries")
def test_python_blocks_run(readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataclass is looked up by the name of its module, so each block runs in one that is registered."""
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks(readme, "python")):
        module = ModuleType(f"readme_block_{number}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(block, f"{readme}, block {number}", "exec", dont_inherit=True), vars(module))


def commands(readme: Path) -> list[str]:
    """Return the command lines of a README, without their comments."""
    lines = [line.split("  #")[0].strip() for block in blocks(readme, "bash") for line in block.splitlines()]
    return [command.strip() for line in lines for command in line.split(" && ") if command.strip()]


def parse_command(script: str, words: list[str]) -> Any:
    """Read a script's arguments with what the script itself imports for it."""
    namespace: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))
    config_class = next(value for name, value in namespace.items() if name.endswith("Config"))
    return namespace["parse"](config_class, [word.replace("configs/", f"{ROOT}/configs/") for word in words], description="")


def test_every_script_and_measure_is_shown_with_arguments_that_parse() -> None:
    scripts, measures = set(), set()
    for readme in READMES:
        for command in commands(readme):
            if match := re.search(r"scripts/(\w+)\.py(.*)", command):
                config = parse_command(match[1], shlex.split(match[2]))
                scripts.add(match[1])
                if isinstance(config, MeasureSection):
                    measures |= {one.name for one in chosen(config)}
                elif isinstance(config, CompareConfig):
                    measures |= {one.name for one in chosen(config.eval, of_images=config.data.images is not None)}
    assert scripts == {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert measures == set(MEASURES.names()) - {"masked"}, "masked is not asked for: encoders get it"


def test_schemes_in_commands_that_draw_exist() -> None:
    drawn = [command for readme in READMES for command in commands(readme) if command.startswith("python -m pe_swap show")]
    assert drawn
    for command in drawn:
        words = shlex.split(command)[4:]
        names = [word for word in words[: next(n for n, word in enumerate(words) if word.startswith("--"))] if word != "all"]
        assert set(names) <= set(pe_swap.list_schemes()), command


def test_files_named_in_pytest_commands_exist() -> None:
    run = [shlex.split(command)[1:] for readme in READMES for command in commands(readme) if command.startswith("pytest")]
    assert run
    for words in run:
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word


@every_readme
def test_generated_tables_are_what_the_commands_print(readme: Path) -> None:
    """With UPDATE_README=1 the table is written instead."""

    def printed(command: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(shlex.split(command))
        return out.getvalue()

    text = text_of(readme)
    if os.environ.get("UPDATE_README"):
        fresh = TABLE_OF.sub(lambda match: f"<!-- table of: python -m pe_swap {match[1]} -->\n{printed(match[1])}", text)
        readme.write_text(fresh, encoding="utf-8")
        return
    assert len(re.findall("^<!-- table of:", text, flags=re.MULTILINE)) == len(TABLE_OF.findall(text))
    for command, table in TABLE_OF.findall(text):
        assert table == printed(command), "write it with: UPDATE_README=1 pytest tests/test_readme.py -k generated"


def test_the_table_of_schemes_is_generated() -> None:
    assert [command for command, _ in TABLE_OF.findall(room("pe_swap/schemes"))] == ["schemes --markdown"]


@every_readme
def test_tests_and_files_named_exist(readme: Path) -> None:
    text = text_of(readme)
    for path, function in re.findall(r"`(tests/[\w/]+(?:\.py)?/?)(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        if function:
            assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE), function
    for path in re.findall(r"`((?:pe_swap|scripts|configs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_table_of_what_works_names_tests() -> None:
    rows = cells("## What works with it", room("tests"))[1:]
    assert len(rows) >= 30
    assert all("::test_" in row[-1] or row[-1].startswith("not run: ") for row in rows)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every_readme
def test_links_and_pictures_lead_somewhere(readme: Path) -> None:
    prose = re.sub(r"```.*?```", "", text_of(readme), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        path, _, fragment = target.partition("#")
        aim = (readme.parent / path).resolve() if path else readme
        assert aim.exists(), target
        if fragment:
            assert fragment in {anchor(line.lstrip("#")) for line in text_of(aim).splitlines() if line.startswith("#")}, target


def test_the_quickstart_s_table_is_that_of_its_schemes() -> None:
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    assert [row[0] for row in cells("# pe_swap", room("."))[1:]] == list(quickstart["schemes"])


def test_every_recipe_is_in_the_readme_of_recipes() -> None:
    linked = set(re.findall(r"\]\(([\w/]+\.yaml)\)", room("configs")))
    assert linked == {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
    shown = " ".join(commands(ROOT / "configs" / "README.md"))
    assert all(f"configs/{name}" in shown for name in linked)


def test_the_checklist_of_a_scheme_has_its_attributes_and_hooks() -> None:
    text = room("pe_swap/schemes")
    declared = [name for name in Scheme.__annotations__ if not name.startswith("_")]
    assert names_in_first_column("3. **The class**", text) == declared
    assert set(names_in_first_column("4. **Override", text)) == INPUT_HOOKS | ATTENTION_HOOKS
    for name in names_in_first_column("fits no hook", text):
        assert hasattr(Scheme, name), name
    for row in cells("3. **The class**", text)[1:]:
        name, default = row[0].strip("`"), row[2].strip("`")
        assert repr(getattr(Scheme, name, "-")).strip("'") == default, name


def test_the_checklist_of_a_family_has_its_fields() -> None:
    fields = [field.name for field in dataclasses.fields(Stack)]
    assert names_in_first_column("2. **Fill the fields**", room("pe_swap/families")) == fields


def test_every_family_has_a_row() -> None:
    assert sorted(set(names_in_first_column("## All families", room("pe_swap/families")))) == pe_swap.list_families()


def test_the_floors_are_those_of_the_layering_test() -> None:
    listed = re.search(r"floors, from the ground up\n(.*?)```", room("pe_swap"), flags=re.DOTALL)[1]
    assert [set(line.strip().split(", ")) for line in listed.splitlines()] == [set(floor) for floor in FLOORS]


def test_the_report_shown_has_the_lines_of_a_report() -> None:
    model = pe_swap.swap_positional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=96)), "alibi")
    (shown,) = [block for block in blocks(ROOT / "pe_swap" / "README.md", "text") if "all claims hold" in block]
    numbers = re.compile(r"\d\.\de[+-]\d\d")
    assert numbers.sub("#", shown).strip() == numbers.sub("#", str(pe_swap.check_positional(model))).strip()


@every_readme
def test_no_placeholder_is_left(readme: Path) -> None:
    assert not re.findall(r"^@?[A-Z]+(?:_[A-Z]+)*@?$", text_of(readme), flags=re.MULTILINE)
