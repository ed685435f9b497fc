"""The README's code runs, its commands exist, and its tables say what the registries say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pe_swap.commands.gallery import markdown_table
from pe_swap.runs import config as configs
from pe_swap.runs.command_line import parse
from pe_swap.schemes import SCHEMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SCHEMES, "_entries", dict(SCHEMES._entries))  # the README registers one of its own
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})


def test_commands_name_scripts_and_files_that_exist_and_arguments_that_parse() -> None:
    lines = [line.split("  #")[0] for block in blocks("bash") for line in block.splitlines() if "scripts/" in line]
    classes = {
        "finetune": configs.FinetuneConfig,
        "eval_long_context": configs.EvalConfig,
        "compare": configs.CompareConfig,
        "benchmark": configs.BenchmarkConfig,
    }
    seen = set()
    for line in lines:
        script, arguments = re.search(r"scripts/(\w+)\.py(.*)", line).groups()
        assert (ROOT / "scripts" / f"{script}.py").exists()
        parse(classes[script], [word.replace("configs/", f"{ROOT}/configs/") for word in arguments.split()], description="")
        seen.add(script)
    assert seen == set(classes)


def test_the_table_of_schemes_is_the_registrys() -> None:
    assert markdown_table() in README, "paste the output of: python -m pe_swap schemes --markdown"


def test_tests_named_in_the_readme_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+(?:\.py)?/?)(?:::(\w+))?`", README)
    assert named
    for path, function in named:
        assert (ROOT / path).exists(), path
        if function:
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), function


def test_the_quickstarts_table_is_that_of_its_schemes() -> None:
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    first_screen = README.split("## One call")[0]
    for label in quickstart["schemes"]:
        assert re.search(rf"^\| {label} \|", first_screen, flags=re.MULTILINE), label
    assert all((ROOT / path).exists() for path in re.findall(r"!\[.*?\]\((.*?)\)", README))


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z]+(?:_[A-Z]+)*$", README, flags=re.MULTILINE)
