"""Every file in configs/ loads, and its scheme's options are the scheme's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pe_swap
from pe_swap.runs.config import ORIGINAL, CompareConfig, EvalConfig, FinetuneConfig, SchemeSection, Section, build
from pe_swap.runs.yaml_reader import read_yaml
from pe_swap.schemes import SCHEMES, build_options
from pe_swap.training.transition import needs_no_head

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
CLASSES: dict[str, type[Section]] = {"finetune": FinetuneConfig, "eval_long_context": EvalConfig, "compare": CompareConfig}


def test_the_files_of_the_readme_are_there() -> None:
    names = {path.name for path in FILES}
    assert names >= {"quickstart.yaml", "gpt2_rope.yaml", "gpt2_alibi.yaml", "bert_rope.yaml", "bert_alibi.yaml", "eval.yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_says_how_to_run_it_and_builds(path: Path) -> None:
    command = re.fullmatch(rf"# python scripts/(\w+)\.py --config configs/{path.name}", path.read_text().splitlines()[0])
    assert command is not None
    config = build(CLASSES[command[1]], read_yaml(path))
    schemes: list[SchemeSection] = []
    if isinstance(config, FinetuneConfig):
        schemes = [config.scheme]
    elif isinstance(config, CompareConfig):
        schemes = list(config.schemes.values())
        reads_words = not needs_no_head(config.train.transition, config.train.max_steps)
        assert ORIGINAL in {scheme.name for scheme in schemes} or not reads_words, "a training on words has a control"
    for scheme in schemes:
        if scheme.name != ORIGINAL:
            build_options(SCHEMES[scheme.name].Options, scheme.options)


def test_recall_is_for_every_scheme() -> None:
    config = build(CompareConfig, read_yaml(FOLDER / "recall.yaml"))
    assert [scheme.name for scheme in config.schemes.values()] == [ORIGINAL, *SCHEMES.names()]
    assert config.data.recall is not None
    asked = {name: getattr(config.data.recall, name) for name in ("task", "pairs")}
    assert asked.items() <= config.eval.options["recall"].items(), "it is measured on what it learned"


def test_digits_are_for_every_scheme_of_two_dimensions() -> None:
    config = build(CompareConfig, read_yaml(FOLDER / "digits.yaml"))
    assert list(dict.fromkeys(scheme.name for scheme in config.schemes.values())) == [ORIGINAL, *pe_swap.list_schemes(axes=2)]
    assert len(config.seeds) == 3
