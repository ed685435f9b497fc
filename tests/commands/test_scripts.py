"""The scripts, from their command lines to their files."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import Trainer

from pe_swap.commands import compare as comparing
from pe_swap.commands import evaluate as evaluating
from pe_swap.commands import held_out
from pe_swap.errors import PESwapError
from pe_swap.evaluation import html_report, report
from pe_swap.evaluation.evaluator import DIVERGED
from pe_swap.evaluation.report import COLUMNS
from pe_swap.runs import records
from pe_swap.runs.command_line import run
from tests.support.finetuning import WORDS, KilledError

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")


def call(script: str, *arguments: str) -> int:
    return run(runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"], arguments)


def write_texts(folder: Path) -> list[str]:
    paths = [folder / name for name in ("a.txt", "b.txt", "c.txt")]
    for index, path in enumerate(paths):
        path.write_text(WORDS * 30 + str(index), encoding="utf-8")
    return [str(path) for path in paths]


def write_quick(folder: Path, texts: list[str]) -> Path:
    """Write the configuration of a comparison of two schemes that takes a second."""
    train = {"max_steps": 2, "batch_size": 2, "save_steps": 1, "warmup_steps": 0}
    content: dict[str, Any] = {
        "model": {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16},
        "vocab_size": 280,
        "data": {"text_files": texts, "block_size": 12},
        "base": dict(train),
        "train": train,
        "schemes": {"control": {"name": "original"}, "alibi": {"name": "alibi"}},
        "eval": {"lengths": [16, 32], "protocols": ["nonoverlapping", "same_targets"], "bootstrap_samples": 20},
    }
    path = folder / "quick.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return write_texts(tmp_path)


@pytest.fixture
def quick(tmp_path: Path, texts: list[str]) -> Path:
    return write_quick(tmp_path, texts)


@dataclass(frozen=True)
class Compared:
    """A comparison that is done, with its pictures; tests read it, and copy what they change."""

    out: Path
    measured: list[float]
    """Every perplexity that its trainings measured."""

    def copied(self, label: str, folder: Path) -> Path:
        """Return a copy of one of its models."""
        return Path(shutil.copytree(self.out / "schemes" / label, folder / label))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder, measured, original = tmp_path_factory.mktemp("compared"), [], held_out.perplexity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "perplexity", lambda *args: measured.append(original(*args)) or measured[-1])
        quick = write_quick(folder, write_texts(folder))
        assert (
            call(
                "compare",
                "--config",
                str(quick),
                "--train.eval_steps",
                "1",
                "--train.eval_lengths",
                "32",
                "--out",
                str(folder / "out"),
            )
            == 0
        )
    return Compared(folder / "out", measured)


@pytest.fixture(autouse=True)
def _undrawn(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pictures of all other reports empty: to draw them takes longer than all the rest."""
    monkeypatch.setattr(report, "png", lambda figure: b"")
    monkeypatch.setattr(html_report, "svg", lambda figure: b"")


def test_compare_then_evaluate_then_finetune(compared: Compared, tmp_path: Path, texts: list[str]) -> None:
    out = compared.out
    assert (out / "perplexity.png").stat().st_size > 1000
    assert {"record.json", "report.md", "results.csv", "perplexity.png", "recovery.png"} <= {path.name for path in out.iterdir()}
    recovery = json.loads((out / "record.json").read_text())["recovery"]
    assert [(row["model"], row["length"], row["bound"], row["control_length"], row["last_step"]) for row in recovery] == [
        ("alibi", 12, 1.05, 12, 2), ("alibi", 12, 1.01, 12, 2), ("alibi", 32, 1.05, 12, 2), ("alibi", 32, 1.01, 12, 2),
    ]  # fmt: skip
    assert (out / "report.md").read_text().count("| model | within 5% | within 1% |") == 2
    assert "Perplexity by tokens trained on, 32 tokens of context" in (out / "report.html").read_text()
    rows = json.loads((out / "record.json").read_text())["results"]
    assert all(set(COLUMNS) <= row.keys() for row in rows)
    assert [(row["model"], row["length"]) for row in rows if row["error"]] == [("control", 32)] * 2
    assert all(math.isfinite(row["perplexity"]) for row in rows if not row["error"])

    folders = [str(compared.copied(label, tmp_path)) for label in ("alibi", "control")]
    line = ["--models", *folders, "--lengths", "16", "32", "--protocols", "nonoverlapping", "sliding", "same_targets"]
    assert call("eval_long_context", *line, "--data.text_files", *texts[2:], "--out", str(tmp_path / "eval")) == 0
    record = json.loads((tmp_path / "eval" / "record.json").read_text())
    assert {(row["model"], row["scheme"]) for row in record["results"]} == {("alibi", "alibi"), ("control", "original")}
    assert record["trained_length"] == {"alibi": 12, "control": 12}
    assert record["data"]["repeated_documents"] == 0
    assert call("eval_long_context", *line, "--data.text_files", *texts[1:], "--out", str(tmp_path / "again")) == 0
    assert json.loads((tmp_path / "again" / "record.json").read_text())["data"]["repeated_documents"] == 1
    assert "**1 of these documents were also trained on**" in (tmp_path / "again" / "report.md").read_text()

    line = ["--model", folders[1], "--scheme.name", "rope", "--scheme.base", "20000", "--train.max_steps", "1"]
    line += ["--data.block_size", "16", "--data.text_files", *texts[:2], "--out", str(tmp_path / "tuned")]
    assert call("finetune", *line) == 0
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())["pe_swap"]
    assert saved["schemes"] == [
        {"name": "rope", "options": {"base": 20000, "layout": "half", "fraction": 1.0, "rope_type": "default"}}
    ]


def test_a_comparison_measures_its_base_once(compared: Compared) -> None:
    parts = json.loads((compared.out / "record.json").read_text())["parts"]
    before = {label: part["perplexity"]["before_swap"] for label, part in parts.items()}
    assert (
        before["alibi"]
        == before["control"]
        == parts["control"]["perplexity"]["after_swap"]
        != parts["alibi"]["perplexity"]["after_swap"]
    )
    # Base: before and after training. Both others at two lengths: after the swap, after one step, after training.
    assert len(compared.measured) == 2 + 6 + 6


def test_compare_does_not_redo_what_is_done(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--config", str(quick), "--out", str(tmp_path / "compared")]
    original, done = comparing.finetune, []

    def counted(config: Any, text: Any) -> Any:
        done.append(Path(config.out).name)
        if len(done) == 3:
            raise PESwapError("stopped")
        return original(config, text)

    monkeypatch.setattr(comparing, "finetune", counted)
    assert call("compare", *arguments) == 2
    assert call("compare", *arguments) == 0
    assert done == ["base", "control", "alibi", "alibi"]
    assert call("compare", *arguments) == 0
    assert len(done) == 4


def results(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "record.json").read_text())["results"]
    return found


@pytest.mark.parametrize("where", ["in the first checkpoint", "between checkpoints"])
def test_a_part_that_was_killed_is_done_to_the_same_numbers(
    where: str, compared: Compared, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    step, save = Trainer.training_step, Trainer._save_checkpoint

    def killed_in_a_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "alibi" in self.args.output_dir and self.state.global_step == 1:
            raise KilledError
        return step(self, *args, **kwargs)

    def killed_in_a_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "alibi" in self.args.output_dir:
            (Path(self.args.output_dir) / "checkpoint-1").mkdir(parents=True)
            (Path(self.args.output_dir) / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
            raise KilledError
        return save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        if where == "between checkpoints":
            patch.setattr(Trainer, "training_step", killed_in_a_step)
        else:
            patch.setattr(Trainer, "_save_checkpoint", killed_in_a_checkpoint)
        with pytest.raises(KilledError):
            call("compare", "--config", str(quick), "--out", str(out))
    assert json.loads((out / "schemes" / "alibi" / "record.json").read_text())["status"] == "running"
    resumed, original = [], comparing.finetune
    monkeypatch.setattr(comparing, "finetune", lambda config, text: resumed.append(config.resume) or original(config, text))
    assert call("compare", "--config", str(quick), "--out", str(out)) == 0
    assert resumed == [where == "between checkpoints"]
    assert results(out) == results(compared.out)


def test_an_edited_text_or_model_is_not_taken_for_what_was_done(
    quick: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.json"
    content = yaml.safe_load(quick.read_text())["model"]
    model.write_text(json.dumps(content))
    arguments = ["--config", str(quick), "--model", str(model), "--out", str(tmp_path / "out")]
    arguments += ["--schemes", "{alibi: {name: alibi}}", "--eval.lengths", "16", "--eval.protocols", "nonoverlapping"]
    found = []
    for change in ("nothing", "text", "held-out text", "model"):
        if change == "model":
            model.write_text(json.dumps({**content, "n_layer": 2}))
        elif change != "nothing":
            Path(texts[0 if change == "text" else 2]).write_text(WORDS * (31 + len(found)), encoding="utf-8")
        if change != "nothing":
            assert call("compare", *arguments) == 2
            assert "--overwrite" in capsys.readouterr().err
        assert call("compare", *arguments, "--overwrite") == 0
        assert "kept" not in "".join(capsys.readouterr())
        found.append(results(tmp_path / "out"))
    assert all(found.count(rows) == 1 for rows in found)
    assert call("compare", *arguments) == 0
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if "kept" in line] == [
        f"{label}: done before, kept" for label in ("base", "alibi")
    ]
    assert "alibi: measured before, kept" in printed.err


def test_a_part_that_was_stopped_is_not_mixed_with_another_text(
    quick: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, out = Trainer.training_step, tmp_path / "out"

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            raise KilledError
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(KilledError):
            call("compare", "--config", str(quick), "--out", str(out))
    Path(texts[0]).write_text(WORDS * 31, encoding="utf-8")
    assert call("compare", "--config", str(quick), "--out", str(out)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: '{out / 'base'}' holds a part of other data or another model. Bring that back, train the part anew with --overwrite, or "
        "compare in another --out."
    )


def test_a_scheme_that_diverges_is_rows_beside_the_others(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--config", str(quick), "--out", str(out), "--schemes", "{control: {name: original}, t5: {name: t5}}"]
    arguments += ["--train.positional_learning_rate", "1e38"]
    for said in ("its losses or weights are not finite", "diverged before, and nothing it depends on has changed"):
        assert call("compare", *arguments) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert shown.splitlines()[-1].startswith("error: Rows of t5 are errors")
        rows = results(out)
        assert [row["error"] for row in rows if row["model"] == "t5"] == [DIVERGED] * 4
        assert [row["error"] is None for row in rows if row["model"] == "control"] == [True, False] * 2
    assert f"* t5 at 16: {DIVERGED}" in (out / "report.md").read_text()
    assert "NaN" not in (out / "record.json").read_text()


def test_a_base_that_diverges_ends_a_comparison(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(quick), "--out", str(tmp_path / "out"), "--base.learning_rate", "1e30"]
    assert call("compare", *arguments) == 2
    assert f"error: The training in '{tmp_path / 'out' / 'base'}' diverged: its losses" in capsys.readouterr().err
    assert call("compare", *arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: The training in '{tmp_path / 'out' / 'base'}' diverged before, and nothing it depends on has changed. Train with a "
        "lower learning_rate, or more warmup_steps."
    )


def test_a_comparison_is_evaluated_on_held_out_text_alone(compared: Compared) -> None:
    assert json.loads((compared.out / "record.json").read_text())["data"]["documents"] == 1


def test_an_evaluation_that_was_killed_keeps_the_models_it_measured(
    compared: Compared, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(compared.copied(label, tmp_path)) for label in ("control", "alibi")]
    line = ["--models", *folders, "--lengths", "16", "--protocols", "nonoverlapping", "--bootstrap_samples", "20"]
    line += ["--data.text_files", *texts, "--out", str(tmp_path / "e")]
    loaded, original = [], evaluating.load_model

    def counted(name: str, *args: Any, **settings: Any) -> Any:
        loaded.append(Path(name).name)
        if loaded == ["control", "alibi"]:
            raise KilledError
        return original(name, *args, **settings)

    monkeypatch.setattr(evaluating, "load_model", counted)
    with pytest.raises(KilledError):
        call("eval_long_context", *line)
    assert not (tmp_path / "e" / "record.json").exists()
    assert call("eval_long_context", *line) == 0
    assert call("eval_long_context", *line) == 0
    assert loaded == ["control", "alibi", "alibi"]
    kept = results(tmp_path / "e")
    assert call("eval_long_context", *line, "--out", str(tmp_path / "anew")) == 0
    assert results(tmp_path / "anew") == kept
    for change in (["--lengths", "8"], ["--seed", "1"], ["--dtype", "bfloat16"], ["--data.text_files", texts[0]]):
        before = len(loaded)
        line += change  # one after the other: each run differs from the one before in this alone
        assert call("eval_long_context", *line) == 0
        assert loaded[before:] == ["control", "alibi"], change


def test_a_corrupt_model_among_several_is_rows_and_the_others_stand(
    compared: Compared, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alibi, control = (compared.copied(label, tmp_path) for label in ("alibi", "control"))
    whole = (alibi / "model.safetensors").read_bytes()
    (alibi / "model.safetensors").write_bytes(b"broken")
    line = ["--models", str(alibi), str(control), "--lengths", "16", "--protocols", "nonoverlapping"]
    line += ["--data.text_files", texts[0], "--out", str(tmp_path / "e")]
    assert call("eval_long_context", *line) == 0
    broken, sound = results(tmp_path / "e")
    assert broken["error"].startswith(f"The weights in '{alibi}' cannot be read")
    assert f"alibi: The weights in '{alibi}' cannot be read" in capsys.readouterr().err
    assert sound["perplexity"] > 0
    (alibi / "model.safetensors").write_bytes(whole)
    assert call("eval_long_context", *line) == 0
    assert [row["error"] for row in results(tmp_path / "e")] == [None, None]


def test_an_evaluation_is_told_to_the_model_card(
    compared: Compared, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alibi, control = (compared.copied(label, tmp_path) for label in ("alibi", "control"))
    line = ["--lengths", "16", "64", "--data.text_files", texts[0], "--out", str(tmp_path / "e"), "--models"]
    assert call("eval_long_context", *line, str(alibi), str(control)) == 0
    card = (alibi / "README.md").read_text()
    assert "| alibi | `slopes='press'`, `trainable=False` | every layer |" in card
    assert "- Trained length before the swap: 16 positions.\n- Fine-tuned after the swap at: 12 tokens.\n" in card
    assert re.search(
        r"- Evaluated lengths: nonoverlapping, [\d,]+ tokens scored\.\n\n.*\n.*\n\| 16 \| [\d.]+ \|\n\| 64 \| [\d.]+ \|\n", card
    )
    assert not (control / "README.md").exists()

    cached = tmp_path / "hub" / "models--us--alibi" / "snapshots" / "0"
    shutil.copytree(alibi, cached)
    (cached / "README.md").write_text("as it came")
    assert call("eval_long_context", *line, str(cached)) == 0
    assert (cached / "README.md").read_text() == "as it came"

    def read_only(*args: Any) -> None:
        raise PermissionError(13, "Permission denied", "README.md")

    monkeypatch.setattr("pe_swap.saving.model_card.ModelCard.save", read_only)
    capsys.readouterr()
    assert call("eval_long_context", *line, str(alibi)) == 0
    assert (
        f"What was measured could not be written into the model card in '{alibi}': [Errno 13] Permission denied: 'README.md'\n"
        in capsys.readouterr().err
    )


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


def test_a_corrupt_model_is_named(
    compared: Compared, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alibi = compared.copied("alibi", tmp_path)
    (alibi / "model.safetensors").write_bytes(b"broken")
    line = ["--models", str(alibi), "--lengths", "16", "--data.text_files", texts[0], "--out", str(tmp_path / "e")]
    assert call("eval_long_context", *line) == 2
    assert f"The weights in '{alibi}' cannot be read" in capsys.readouterr().err


def test_models_of_two_vocabularies_are_refused(
    compared: Compared, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 16}"
    line = ["--model", model, "--vocab_size", "300", "--scheme.name", "original", "--train.max_steps", "1"]
    line += ["--data.block_size", "12", "--data.text_files", *texts, "--out", str(tmp_path / "300")]
    assert call("finetune", *line) == 0
    models = [str(compared.copied("control", tmp_path)), str(tmp_path / "300")]
    line = ["--models", *models, "--lengths", "16", "--data.text_files", texts[0], "--out", str(tmp_path / "e")]
    assert call("eval_long_context", *line) == 2
    assert "have different vocabularies; perplexities are compared on the same tokens" in capsys.readouterr().err
    line += ["--unit", "bits_per_byte"]
    assert call("eval_long_context", *line, "--protocols", "same_targets") == 2
    assert "so same_targets would take different text from each" in capsys.readouterr().err
    assert call("eval_long_context", *line, "--protocols", "nonoverlapping", "--max_document_characters", "2000") == 0
    first, second = results(tmp_path / "e")
    assert first["document_bytes"] == second["document_bytes"] == [2000]
    assert first["tokens"] != second["tokens"]
    assert second["ratio"] == pytest.approx(2 ** (second["bits_per_byte"] - first["bits_per_byte"]))
    (tmp_path / "file").write_text("mine")
    line[-3:] = [str(tmp_path / "file"), "--unit", "bits_per_byte"]
    assert call("eval_long_context", *line) == 2
    assert "is a file. Name a folder." in capsys.readouterr().err


def test_an_unknown_key_ends_a_process_with_status_two_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--train.max_step", "3"])
    monkeypatch.setattr(records, "flush_denormals", lambda: None)  # it would hold for the tests after this one
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "finetune.py"), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "error: Unknown key 'train.max_step'. Did you mean 'max_steps'?" in said
    assert "Traceback" not in said


def test_two_processes_train_as_one_with_the_same_effective_batch(texts: list[str], tmp_path: Path) -> None:
    """Half of the steps match the unswapped model, where the head for words gets no gradients."""
    model = tmp_path / "model.yaml"
    model.write_text(
        "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 16, attn_pdrop: 0, embd_pdrop: 0, resid_pdrop: 0}"
    )
    read = ["--data.text_files", *texts, "--data.block_size", "16"]
    started = ["--model", str(model), "--vocab_size", "280", *read, "--train.max_steps", "2", "--out", str(tmp_path / "base")]
    assert call("finetune", *started) == 0
    script = [str(SCRIPTS / "finetune.py"), "--model", str(tmp_path / "base"), *read]
    script += ["--scheme.name", "rope", "--train.max_steps", "4", "--train.logging_steps", "1", "--train.bf16", "false"]
    script += ["--train.transition.match", "attention", "--train.transition.match_share", "0.5"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    assert call("finetune", *script[1:], "--train.batch_size", "8", "--out", str(tmp_path / "one")) == 0
    command = [sys.executable, *launch, *script, "--train.batch_size", "4", "--out", str(tmp_path / "two")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[list[float]] = []
    for label in ("one", "two"):
        record = json.loads((tmp_path / label / "record.json").read_text())
        assert record["processes"] == len(found) + 1
        found.append([entry["loss"] for entry in record["training"]["log"]])
        assert [entry["objective"] for entry in record["training"]["log"]] == ["attention"] * 2 + ["cross_entropy"] * 2
    assert len(set(found[0])) > 1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("label", ["../x", "a/b", "", ".", "..", ".hidden", "a ", "a.", "a|b", "a\nb"])
def test_a_label_that_is_no_folders_name_is_refused(
    label: str, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(quick.read_text())
    quick.write_text(yaml.safe_dump({**content, "schemes": {label: {"name": "original"}}}))
    assert call("compare", "--config", str(quick), "--out", str(tmp_path / "out")) == 2
    assert f"schemes has the label {label!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_may_be_names_of_the_comparisons_own_folders(compared: Compared, quick: Path, tmp_path: Path) -> None:
    schemes = "{base: {name: original}, evaluation: {name: alibi}}"
    assert call("compare", "--config", str(quick), "--schemes", schemes, "--out", str(tmp_path / "out")) == 0
    found, expected = ([row["perplexity"] for row in results(out)] for out in (tmp_path / "out", compared.out))
    assert found == expected


def test_labels_of_one_folder_are_refused(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schemes = "{rope: {name: rope}, Rope: {name: original}}"
    assert call("compare", "--config", str(quick), "--schemes", schemes, "--out", str(tmp_path / "out")) == 2
    assert "schemes has the labels 'rope' and 'Rope'" in capsys.readouterr().err


def test_a_comparison_does_not_replace_another_kind_of_run(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    for name, content, said in (
        ("report.md", "mine", "holds report.md that no"),
        ("record.json", '{"kind": "finetune"}', "of another kind"),
    ):
        (tmp_path / "out" / name).write_text(content)
        assert call("compare", "--config", str(quick), "--out", str(tmp_path / "out")) == 2
        assert said in capsys.readouterr().err
        assert (tmp_path / "out" / name).read_text() == content


def test_a_log_holds_no_progress_bars(quick: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "compare.py"), "--config", str(quick), "--out", str(tmp_path / "out")]
    command += ["--schemes", "{alibi: {name: alibi}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "it/s" not in done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "training" in line] == [
        f"{name}: training" for name in ("base", "alibi")
    ]
    assert len(done.stdout.splitlines()) < 10


def test_a_comparison_over_seeds(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ["--config", str(quick), "--out", str(out)]
    assert call("compare", *arguments) == 0
    alone = results(out)
    done, original = [], comparing.finetune
    monkeypatch.setattr(comparing, "finetune", lambda config, text: done.append(config.out) or original(config, text))
    assert call("compare", *arguments, "--seeds", "0", "1") == 0
    assert done == [str(out / "seeds" / "1" / part) for part in ("base", "schemes/control", "schemes/alibi")]
    record = json.loads((out / "record.json").read_text())
    assert [row["seeds"] for row in record["results"]] == [[0, 1]] * len(alone)
    runs: dict[Any, list[Any]] = {}
    for row in record["runs"]:
        runs.setdefault((row["model"], row["protocol"], row["length"]), []).append(row)
    for row, first in zip(record["results"], alone, strict=True):
        zero, one = runs[row["model"], row["protocol"], row["length"]]
        assert {**zero, "ratio": None} == {**first, "ratio": None}
        assert zero["ratio"] == pytest.approx(first["ratio"])
        if row["perplexity"] is not None:
            assert one["perplexity"] != zero["perplexity"]
            assert row["perplexity"] == pytest.approx(math.sqrt(zero["perplexity"] * one["perplexity"]))
            assert row["ratio"] == pytest.approx(math.sqrt(zero["ratio"] * one["ratio"]))
    assert record["parts_of_further_seeds"]["1"].keys() == record["parts"].keys()
    assert "seeds 0, 1." in (out / "report.md").read_text()
    assert {line.split(",")[2] for line in (out / "results.csv").read_text().splitlines()[1:]} == {"0 1", "0", "1"}


def test_recall_is_trained_from_scratch_under_each_scheme(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(quick.read_text())
    del content["base"], content["vocab_size"]
    content["data"] = {"recall": {"pairs": 2, "words": 9, "sequences": 40}, "block_size": 16}
    content["eval"] = {"lengths": [16, 32], "protocols": [], "measures": ["recall"], "options": {"recall": {"pairs": 2}}}
    quick.write_text(yaml.safe_dump(content, sort_keys=False))
    out = tmp_path / "out"
    assert call("compare", "--config", str(quick), "--out", str(out)) == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["evaluation", "schemes"]
    record = json.loads((out / "record.json").read_text())
    assert [(row["model"], row["length"], row["error"] is None, row["count"]) for row in record["probes"]] == [
        ("control", 16, True, 64), ("control", 32, False, 0), ("alibi", 16, True, 64), ("alibi", 32, True, 64),
    ]  # fmt: skip
    assert "perplexity" not in (out / "report.md").read_text().lower()
    assert json.loads((out / "schemes" / "alibi" / "record.json").read_text())["training"]["blocks"] == 40
    capsys.readouterr()
    for change, said in (
        (["--vocab_size", "300"], "it takes no tokenizer and no vocab_size. Drop them."),
        (["--model", "{model_type: bert, num_hidden_layers: 1, hidden_size: 16, num_attention_heads: 2}"], "looks both ways"),
    ):
        assert call("compare", "--config", str(quick), "--out", str(tmp_path / "other"), *change) == 2
        assert said in capsys.readouterr().err
