"""The scripts, from their command lines to their files."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pe_swap import compare as comparing
from pe_swap.config import run
from pe_swap.errors import PESwapError
from pe_swap.report import COLUMNS

SCRIPTS = Path(__file__).parents[1] / "scripts"
WORDS = "we the people of the united states in order to form a more perfect union establish justice "

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")


def call(script: str, *arguments: str) -> int:
    return run(runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"], arguments)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for index, path in enumerate(paths):
        path.write_text(WORDS * 30 + str(index), encoding="utf-8")
    return [str(path) for path in paths]


@pytest.fixture
def quick(tmp_path: Path, texts: list[str]) -> Path:
    train = {"max_steps": 2, "batch_size": 2, "save_steps": 1, "warmup_steps": 0}
    content: dict[str, Any] = {
        "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16},
        "vocab_size": 280,
        "data": {"text_files": texts, "block_size": 16},
        "base": train,
        "train": train,
        "schemes": {"control": {"name": "original"}, "alibi": {"name": "alibi"}},
        "eval": {"lengths": [16, 32], "protocols": ["nonoverlapping", "same_targets"], "bootstrap_samples": 20},
    }
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_compare_then_evaluate_then_finetune(quick: Path, tmp_path: Path, texts: list[str]) -> None:
    out = tmp_path / "compared"
    assert call("compare", "--config", str(quick), "--out", str(out)) == 0
    assert {"record.json", "report.md", "results.csv", "perplexity.png"} <= {path.name for path in out.iterdir()}
    rows = json.loads((out / "record.json").read_text())["results"]
    assert all(set(COLUMNS) <= row.keys() for row in rows)
    assert [(row["model"], row["length"]) for row in rows if row["error"]] == [("control", 32)] * 2
    assert all(math.isfinite(row["perplexity"]) for row in rows if not row["error"])

    folders = [str(out / "alibi"), str(out / "control")]
    line = ["--models", *folders, "--lengths", "16", "32", "--protocols", "nonoverlapping", "sliding", "same_targets"]
    assert call("eval_long_context", *line, "--data.text_files", *texts[2:], "--out", str(tmp_path / "eval")) == 0
    record = json.loads((tmp_path / "eval" / "record.json").read_text())
    assert {(row["model"], row["scheme"]) for row in record["results"]} == {("alibi", "alibi"), ("control", "original")}
    assert record["trained_length"] == {"alibi": 16, "control": 16}

    line = ["--model", folders[1], "--scheme.name", "rope", "--scheme.base", "20000", "--train.max_steps", "1"]
    line += ["--data.block_size", "16", "--data.text_files", *texts[:2], "--out", str(tmp_path / "tuned")]
    assert call("finetune", *line) == 0
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())["pe_swap"]
    assert saved["schemes"] == [
        {"name": "rope", "options": {"base": 20000, "layout": "half", "fraction": 1.0, "rope_type": "default"}}
    ]


def test_compare_does_not_redo_what_is_done(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--config", str(quick), "--out", str(tmp_path / "compared")]
    original, done = comparing.finetune, []

    def counted(config: Any) -> Any:
        done.append(Path(config.out).name)
        if len(done) == 3:
            raise PESwapError("stopped")
        return original(config)

    monkeypatch.setattr(comparing, "finetune", counted)
    assert call("compare", *arguments) == 2
    assert call("compare", *arguments) == 0
    assert done == ["base", "control", "alibi", "alibi"]
    assert call("compare", *arguments) == 0
    assert len(done) == 4


@pytest.mark.parametrize("length", ["0", "-1", "1.5"])
def test_a_bad_length_is_a_message_and_not_a_traceback(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval_long_context", "--models", "x", "--lengths", length) == 2
    assert "'lengths.0'" in capsys.readouterr().err


def test_a_missing_model_is_named_before_anything_runs(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "nowhere")
    assert call("eval_long_context", "--models", missing, "--data.text_files", texts[0], "--out", str(tmp_path / "e")) == 2
    assert f"Cannot load a model from '{missing}'" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_corrupt_model_is_named(quick: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compared"
    assert call("compare", "--config", str(quick), "--out", str(out)) == 0
    (out / "alibi" / "model.safetensors").write_bytes(b"broken")
    line = ["--models", str(out / "alibi"), "--lengths", "16", "--data.text_files", texts[0], "--out", str(tmp_path / "e")]
    assert call("eval_long_context", *line) == 2
    assert f"The weights in '{out / 'alibi'}' cannot be read" in capsys.readouterr().err


def test_models_of_two_vocabularies_are_refused(
    quick: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for size in ("280", "300"):
        folders.append(str(tmp_path / size))
        line = ["--config", str(quick), "--vocab_size", size, "--schemes", "{control: {name: original}}", "--out", folders[-1]]
        assert call("compare", *line) == 0
    models = [f"{folder}/control" for folder in folders]
    line = ["--models", *models, "--lengths", "16", "--data.text_files", texts[0], "--out", str(tmp_path / "e")]
    assert call("eval_long_context", *line) == 2
    assert "have different vocabularies" in capsys.readouterr().err


def test_an_unknown_key_ends_a_process_with_status_two_and_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "finetune.py"), "--train.max_step", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: Unknown key 'train.max_step'. Did you mean 'max_steps'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes_train_as_one_with_the_same_effective_batch(texts: list[str], tmp_path: Path) -> None:
    model = tmp_path / "model.yaml"
    model.write_text(
        "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 16, attn_pdrop: 0, embd_pdrop: 0, resid_pdrop: 0}"
    )
    script = [str(SCRIPTS / "finetune.py"), "--model", str(model), "--vocab_size", "280", "--data.text_files", *texts]
    script += ["--scheme.name", "rope", "--data.block_size", "16", "--train.max_steps", "4", "--train.logging_steps", "1"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    found = []
    for label, launcher, batch_size in (("one", [], "8"), ("two", launch, "4")):
        command = [sys.executable, *launcher, *script, "--train.batch_size", batch_size, "--out", str(tmp_path / label)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / label / "record.json").read_text())
        assert record["processes"] == len(found) + 1
        found.append([entry["loss"] for entry in record["training"]["log"]])
    assert len(set(found[0])) > 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)
