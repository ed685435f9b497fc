"""What an evaluation of several models holds in memory: one of them."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from pe_swap.commands import evaluate as command
from pe_swap.commands.finetune import finetune
from pe_swap.errors import UnsupportedModelError
from pe_swap.evaluation.evaluator import Evaluator
from pe_swap.runs.config import DataSection, EvalConfig
from tests.support.finetuning import config


@pytest.mark.parametrize("first_fails", [False, True])
def test_a_model_is_gone_before_the_next_one_is_loaded(
    first_fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(tmp_path / name) for name in ("one", "two", "three")]
    for folder in folders:
        settings = config(tmp_path, out=folder)
        finetune(settings.model_copy(update={"train": settings.train.model_copy(update={"max_steps": 0})}))
    (tmp_path / "c.txt").write_text((tmp_path / "a.txt").read_text()[::-1])
    loaded: list[weakref.ref[Any]] = []
    load_model, rows = command.load_model, Evaluator.rows

    def load(*args: Any, **kwargs: Any) -> Any:
        assert [reference() for reference in loaded if reference() is not None] == []
        model = load_model(*args, **kwargs)
        loaded.append(weakref.ref(model.base_model))  # its layers refer to it
        return model

    def measured(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        if first_fails and len(loaded) == 1:
            raise UnsupportedModelError("not this one")
        return rows(self, *args, **kwargs)

    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.setattr(Evaluator, "rows", measured)
    gc.disable()  # as it knows nothing of a GPU's memory, Python may not collect for long
    try:
        text = DataSection(text_files=[str(tmp_path / "c.txt")])
        record = command.evaluate(EvalConfig(models=folders, lengths=[16], data=text, out=str(tmp_path / "out")))
    finally:
        gc.enable()
    assert len(loaded) == 3
    assert {row["model"]: row["error"] is None for row in record["results"]} == {
        "one": not first_fails,
        "two": True,
        "three": True,
    }
