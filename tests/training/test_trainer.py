"""Fine-tuning: the same numbers after a kill, and refusals before any time is spent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, TrainingArguments

from pe_swap.commands.finetune import finetune, run_fingerprint
from pe_swap.errors import CheckpointError, ConfigError, DataError, DivergedError, PESwapError
from pe_swap.patching.install import positional_parameters
from pe_swap.runs.config import FinetuneConfig, SchemeSection, TrainSection
from pe_swap.runs.config import build as build_config
from pe_swap.runs.output import OutputFolder
from pe_swap.runs.records import environment
from pe_swap.swap import swap_positional
from pe_swap.training import trainer as training
from pe_swap.training.batches import MaskedBatch, causal_batch
from pe_swap.training.resume import CHECKPOINTS, complete_checkpoints, last_checkpoint
from pe_swap.training.trainer import PositionalTrainer, train
from tests.support.finetuning import GPT2, WORDS, KilledError, config, killed_after, weights
from tests.support.models import TRAINED_LENGTH, build, swapped, token_ids
from tests.support.words import numbered_tokenizer, word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")


def test_a_killed_run_resumes_to_the_same_numbers_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured = finetune(config(tmp_path, out=str(tmp_path / "unmeasured")))
    section = {**config(tmp_path).train.model_dump(), "eval_steps": [2, 4, 5, 6], "eval_lengths": [32]}
    whole = finetune(config(tmp_path, train=section, out=str(tmp_path / "whole")))
    assert whole["training"] == unmeasured["training"], "to measure on the way changes nothing of the training"
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(config(tmp_path, train=section))
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "running"
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-3")
    resumed = finetune(config(tmp_path, train=section, resume=True))
    assert resumed["training"] == whole["training"]
    assert resumed["perplexity"] == whole["perplexity"]
    found = whole["perplexity"]
    by_step = [(row["step"], row["length"], row["tokens"]) for row in found["by_step"]]
    assert by_step == [(step, length, 32 * step) for step in (0, 2, 4, 5, 6) for length in (found["length"], 32)]
    assert [row["perplexity"] for row in found["by_step"][::8]] == [found["after_swap"], found["after_training"]]
    assert len({row["perplexity"] for row in found["by_step"]}) == 10
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_killed_after_its_last_checkpoint_trains_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finetune(config(tmp_path, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(training, "_save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(config(tmp_path))
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-6")
    killed_after(monkeypatch, 0)
    resumed = finetune(config(tmp_path, resume=True))
    assert (resumed["training"], resumed["perplexity"]) == (whole["training"], whole["perplexity"])
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = finetune(config(tmp_path))
    before = files_below(tmp_path / "run")
    killed_after(monkeypatch, 0)
    assert finetune(config(tmp_path, resume=True)) == json.loads(json.dumps(record))
    assert files_below(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"max_steps": 6, "eval_steps": [3, 7]}}, r"eval_steps names step 7, and training ends at step 6"),
        ({"train": {"max_steps": 6, "eval_steps": [3]}, "data": {"recall": {}}}, r"data\.recall has random words"),
        ({"train": {"max_steps": 6, "eval_lengths": [32]}}, r"eval_lengths names 32, and train\.eval_steps names no step"),
        (
            {"train": {"max_steps": 6, "eval_steps": [3], "eval_lengths": [32, 512]}},
            r"A context of 512 tokens .* at most 256 tokens",
        ),
        (
            {"train": {"max_steps": 6, "eval_steps": [3], "eval_max_document_tokens": 8}},
            r"A context of 16 tokens .* at most 8 tokens",
        ),
    ],
)
def test_steps_that_cannot_be_measured(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        finetune(config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [[0], [3, 3], [-1], [1.5]])
def test_steps_are_positive_integers_given_once(steps: list[Any]) -> None:
    with pytest.raises(ConfigError, match="eval_steps"):
        build_config(FinetuneConfig, {"train": {"max_steps": 6, "eval_steps": steps}})


def test_the_training_loss_is_the_mean_of_all_steps(tmp_path: Path) -> None:
    found = finetune(config(tmp_path))["training"]
    assert found["train_loss"] == pytest.approx(sum(entry["loss"] for entry in found["log"]) / 6, rel=1e-4)


def test_a_run_resumed_with_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(config(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"holds a run of 1 processes, and this is one of 2.*Launch 1 processes"):
        finetune(config(tmp_path, resume=True))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nobodys_file_is_deleted(tmp_path: Path) -> None:
    best, notes = tmp_path / "run" / "checkpoints" / "checkpoint-3-best" / "weights.pt", tmp_path / "run" / "notes.txt"
    best.parent.mkdir(parents=True)
    best.write_text("precious")
    with pytest.raises(ConfigError, match=r"holds files that are not of a run, such as 'checkpoints/checkpoint-3-best"):
        finetune(config(tmp_path))
    notes.write_text("mine")
    finetune(config(tmp_path, overwrite=True))
    before = files_below(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds an earlier run\. Name another --out, or start anew with --overwrite"):
        finetune(config(tmp_path))
    assert files_below(tmp_path / "run") == before
    longer = config(tmp_path).train.model_copy(update={"max_steps": 9})
    finetune(config(tmp_path, overwrite=True, train=longer))
    assert (best.read_text(), notes.read_text()) == ("precious", "mine")
    found = {path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()}
    assert found == {"checkpoint-3-best", "checkpoint-6", "checkpoint-9"}
    short = config(tmp_path).train.model_copy(update={"max_steps": 3})
    finetune(config(tmp_path, overwrite=True, train=short))
    assert {path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()} == {"checkpoint-3-best", "checkpoint-3"}


def test_a_record_lists_all_that_its_run_wrote(tmp_path: Path) -> None:
    record = finetune(config(tmp_path))
    assert set(record["files"]) == set(files_below(tmp_path / "run"))


@pytest.mark.parametrize("name", ["README.md", "config.json", "checkpoints/checkpoint-3/optimizer.pt"])
def test_a_file_that_a_run_would_replace_is_not_overwritten(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds '{name}', which no run wrote by its record"):
        finetune(config(tmp_path, overwrite=True))
    assert path.read_text() == "mine"


def test_a_record_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    finetune(config(tmp_path))
    (tmp_path / "mine.txt").write_text("mine")
    path = tmp_path / "run" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": ["../mine.txt", str(tmp_path / "mine.txt")]}))
    with pytest.raises(ConfigError, match="which no run wrote"):
        finetune(config(tmp_path, overwrite=True))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_run_does_not_overwrite_its_own_source(tmp_path: Path) -> None:
    finetune(config(tmp_path))
    before = files_below(tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / CHECKPOINTS / "checkpoint-3"):
        with pytest.raises(ConfigError, match="it would overwrite its own source"):
            finetune(config(tmp_path, model=str(source), vocab_size=None, tokenizer=str(tmp_path / "run"), overwrite=True))
    assert files_below(tmp_path / "run") == before


@pytest.mark.parametrize("out", ["a.txt", "a.txt/run"])
def test_an_output_folder_that_is_a_file_is_refused(out: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.txt' is a file\. Name a folder"):
        finetune(config(tmp_path, out=str(tmp_path / out)))


def test_a_full_disk_while_saving_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "tokenizer.json")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_save_tokenizer", full)
        with pytest.raises(OSError, match="No space left"):
            finetune(config(tmp_path))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {CHECKPOINTS, "record.json"}
    assert finetune(config(tmp_path, resume=True))["status"] == "done"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linaer"}, "train.schedule is 'linaer'"),
        ({"schedule": "warmup_stable_decay"}, "num_decay_steps"),
        ({"schedule": "cosine_with_min_lr"}, "min_lr"),
        ({"schedule": "reduce_lr_on_plateau"}, "not offered"),
        ({"schedule": "linear", "schedule_options": {"power": 2}}, "power"),
        ({"schedule": "constant", "schedule_options": {"power": 2}}, "takes no schedule_options"),
        ({"report_to": ["tensorbord"]}, "is no tracker. Did you mean 'tensorboard'"),
        ({"report_to": ["clearml"]}, "is not installed"),
    ],
    ids=str,
)
def test_schedules_and_trackers_that_cannot_work_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        finetune(config(tmp_path, train={**config(tmp_path).train.model_dump(), **changes}))
    assert not (tmp_path / "run").exists()


def test_mixed_precision_of_a_launcher_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(
        ConfigError, match=r"mixed precision is 'fp16' .* would overrule train\.bf16: 'auto'\. Set train\.bf16 to true"
    ):
        finetune(config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_says_cpu_is_believed_beside_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert environment()["device"] == "a GPU"
    assert training.uses_bf16(config(tmp_path).train)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert environment()["device"].endswith(" cpu")
    arguments = training.training_arguments(config(tmp_path).train, 0, tmp_path)
    assert (arguments.use_cpu, arguments.bf16, arguments.device.type) == (True, False, "cpu")


def test_a_process_trains_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = property(lambda self: 1 if vars(self)["_n_gpu"] == 1 else 2)
    monkeypatch.setattr(TrainingArguments, "n_gpu", several)
    assert training.training_arguments(config(tmp_path).train, 0, tmp_path).n_gpu == 1


def test_a_schedule_takes_its_arguments(tmp_path: Path) -> None:
    wanted = {"schedule": "warmup_stable_decay", "schedule_options": {"num_decay_steps": 2}}
    assert finetune(config(tmp_path, train={**config(tmp_path).train.model_dump(), **wanted}))["status"] == "done"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="but the model has rows for 100"):
        finetune(config(tmp_path, model={**GPT2, "vocab_size": 100}))
    assert not (tmp_path / "run").exists()


def test_bf16_is_for_gpus_and_costs_a_line_on_other_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = config(tmp_path).train
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not including_emulation)
        assert training.uses_bf16(section) is available
        assert not training.uses_bf16(section.model_copy(update={"bf16": False}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    arguments = SimpleNamespace(bf16=True)
    training.warn_of_slow_training(build("gpt2", attn_pdrop=0.1), arguments, drops=True)  # type: ignore[arg-type]
    assert [line.split(" is ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "warning: train.bf16",
        "warning: attn_pdrop",
    ]
    training.warn_of_slow_training(build("gpt2", attn_pdrop=0.1), SimpleNamespace(bf16=False), drops=False)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_a_run_is_a_record_and_a_folder_that_loads(tmp_path: Path) -> None:
    record = finetune(config(tmp_path))
    saved = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (saved["status"], saved["scheme"], saved["seed"]) == ("done", "t5", 0)
    assert saved["config"]["scheme"].items() >= {"name": "t5", "num_buckets": 8, "layers": None}.items()
    assert {"versions", "commit", "device", "seconds"} <= saved.keys()
    assert record["perplexity"]["after_training"] < 0.8 * record["perplexity"]["after_swap"]
    assert record["training"]["dropped_tokens"] < 16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "pe_swap_gpt2"


def test_the_control_is_trained_and_not_swapped(tmp_path: Path) -> None:
    record = finetune(config(tmp_path, scheme={"name": "original"}))
    assert record["scheme"] == "original"
    assert record["perplexity"]["before_swap"] == record["perplexity"]["after_swap"] > record["perplexity"]["after_training"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "gpt2"


def test_every_row_of_a_learned_table_is_trained() -> None:
    model = build("gpt2").train()
    model(**causal_batch([{"input_ids": list(range(5, 6 + TRAINED_LENGTH))}])).loss.backward()
    assert model.transformer.wpe.weight.grad.abs().amax(dim=1).min() > 0


def test_an_encoder_is_trained_on_masked_tokens(tmp_path: Path) -> None:
    documents = [[5 + index % 7 for index in range(300)]]
    section = config(tmp_path).train
    result = train(
        swapped("bert", "alibi"),
        numbered_tokenizer(masked=True),
        documents,
        section,
        block_size=16,
        seed=0,
        output=OutputFolder(tmp_path / "b"),
    )
    assert result["log"][-1]["loss"] < result["log"][0]["loss"]
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "b").config.model_type == "pe_swap_bert"


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "distilbert", "falcon"])
def test_dropout_can_be_left_out_of_a_training(family: str) -> None:
    names = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "dropout", "hidden_dropout_prob", "hidden_dropout")
    model = build(family, **dict.fromkeys((*names, "attention_probs_dropout_prob"), 0.5)).train()
    tokens = token_ids(1, 9)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    with training.without_dropout(model):
        torch.testing.assert_close(model(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=2e-5)
        model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_an_encoder_that_is_started_has_a_vocabulary_with_a_mask(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = {"model_type": "bert", "max_position_embeddings": 16, **sizes}
    assert finetune(config(tmp_path, model=model, scheme={"name": "alibi"}))["status"] == "done"
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = {saved.mask_token_id, saved.pad_token_id, saved.cls_token_id}
    assert len(ids) == 3
    assert None not in ids


def test_masks_follow_from_the_batch_and_the_seed() -> None:
    rows = [{"input_ids": [5 + (index + row) % 7 for index in range(200)]} for row in range(4)]
    batch = MaskedBatch(numbered_tokenizer(masked=True), 0.15, seed=1)
    first = batch(rows)
    torch.rand(3)  # whatever else draws
    assert all(torch.equal(value, first[name]) for name, value in batch(rows).items())
    assert 0.1 < (first["labels"] != -100).float().mean() < 0.2
    assert not torch.equal(batch(rows[:3])["labels"], first["labels"][:3])
    assert not torch.equal(MaskedBatch(numbered_tokenizer(masked=True), 0.15, seed=2)(rows)["labels"], first["labels"])


def test_a_resumed_encoder_meets_the_same_masks(tmp_path: Path) -> None:
    documents = [[5 + index % 7 for index in range(900)]]
    losses = []
    for resumes in (False, True):
        model, out = swapped("bert", "alibi"), tmp_path / str(resumes)
        section = config(tmp_path).train.model_copy(update={"save_steps": 2, "max_steps": 6, "logging_steps": 1})
        arguments = {"block_size": 16, "seed": 0, "output": OutputFolder(out)}
        if resumes:
            train(model, numbered_tokenizer(masked=True), documents, section, **arguments)
            shutil.rmtree(out / "checkpoints" / "checkpoint-6")
            model = swapped("bert", "alibi")
        losses.append(train(model, numbered_tokenizer(masked=True), documents, section, resume=resumes, **arguments)["log"])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]


def test_an_encoder_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no mask token"):
        train(
            swapped("bert", "alibi"),
            numbered_tokenizer(),
            [[5] * 90],
            config(tmp_path).train,
            block_size=16,
            seed=0,
            output=OutputFolder(tmp_path),
        )


@pytest.mark.parametrize(("case", "as_the_rest"), [("t5", set()), ("concat-learned", {"token_weight", "position_weight"})])
def test_positional_parameters_get_their_own_learning_rate(case: str, as_the_rest: set[str], tmp_path: Path) -> None:
    model = swapped("gpt2", case)
    trainer = PositionalTrainer(
        model=model,
        args=training.training_arguments(config(tmp_path).train, 0, tmp_path),
        train_dataset=[{"input_ids": [5, 6]}],
        data_collator=causal_batch,
        positional_learning_rate=0.5,
    )
    groups = trainer.create_optimizer().param_groups
    ours = {id(parameter) for name, parameter in positional_parameters(model) if name.rpartition(".")[2] not in as_the_rest}
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert ours
    assert found.keys() == {id(parameter) for parameter in model.parameters()}
    assert {rate for parameter, rate in found.items() if parameter in ours} == {0.5}
    assert {rate for parameter, rate in found.items() if parameter not in ours} == {1e-2}


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((3, '{"global_step": 3}'), (20, '{"global_step": 20}'), (100, '{"global_st'), (200, None)):
        folder = tmp_path / CHECKPOINTS / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20"]


@pytest.mark.parametrize(
    ("family", "scheme", "options", "length"),
    [
        ("gpt2", "alibi", {}, 2**20),
        ("gpt2", "learned", {}, TRAINED_LENGTH),
        ("bert", "rope", {}, 2**20),
        ("llama", "rope", {"rope_type": "yarn", "factor": 4.0}, 4 * TRAINED_LENGTH),
    ],
)
def test_the_saved_tokenizer_cuts_where_the_swapped_model_ends(
    family: str, scheme: str, options: dict[str, Any], length: int, tmp_path: Path
) -> None:
    words = word_tokenizer(family)
    words.model_max_length = 8
    model = swap_positional(build(family), scheme, **options)
    section = TrainSection(max_steps=0)
    train(model, words, [], section, block_size=16, seed=0, output=OutputFolder(tmp_path))
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.model_max_length == length == AutoConfig.from_pretrained(tmp_path).max_position_embeddings
    assert len(saved("w9 " * 20, truncation=True)["input_ids"]) >= 20


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint to resume from in .*Run without --resume to start"):
        finetune(config(tmp_path, resume=True))


def test_a_damaged_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(config(tmp_path))
    (tmp_path / "run" / CHECKPOINTS / "checkpoint-3" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"Cannot resume from '.*checkpoint-3'.*Delete that folder"):
        finetune(config(tmp_path, resume=True))


def test_a_stopped_run_is_not_overwritten_and_another_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(config(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds checkpoints of a run that was stopped. Continue it with --resume"):
        finetune(config(tmp_path))
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        finetune(config(tmp_path, resume=True, seed=1))


def test_resuming_with_another_configuration_names_what_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(config(tmp_path))
    longer = config(tmp_path).train.model_copy(update={"max_steps": 7})
    with pytest.raises(ConfigError) as caught:
        finetune(config(tmp_path, resume=True, seed=1, train=longer))
    assert str(caught.value) == (
        f"'{tmp_path / 'run'}' holds a run with another configuration (another train.max_steps, seed); resuming would mix the two. Use "
        "the same options, or another --out."
    )


def test_resuming_on_a_text_that_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(settings)
    (tmp_path / "a.txt").write_text(WORDS * 21, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        finetune(settings.model_copy(update={"resume": True}))
    assert str(caught.value) == (
        f"'{tmp_path / 'run'}' holds a run on another text: what 'data' names has changed since; resuming would mix the two. Bring the "
        "text back, or start anew in another --out."
    )
    config(tmp_path)  # writes the text as it was
    assert finetune(settings.model_copy(update={"resume": True}))["status"] == "done"


def test_resuming_from_a_model_whose_files_have_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.json"
    model.write_text(json.dumps(GPT2))
    with monkeypatch.context() as patch:
        killed_after(patch, 4)
        with pytest.raises(KilledError):
            finetune(config(tmp_path, model=str(model)))
    model.write_text(json.dumps({**GPT2, "n_inner": 8}))
    with pytest.raises(ConfigError) as caught:
        finetune(config(tmp_path, model=str(model), resume=True))
    assert str(caught.value) == (
        f"'{tmp_path / 'run'}' holds a run from another model or tokenizer: their files have changed since; resuming would mix the two. "
        "Bring them back, or start anew in another --out."
    )


def test_a_fingerprint_is_of_content_and_not_of_the_model_card(tmp_path: Path) -> None:
    finetune(config(tmp_path))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    again = config(tmp_path, model=str(tmp_path / "run"), vocab_size=None, tokenizer=str(tmp_path / "other"))
    found = [run_fingerprint(again, "text")]
    (tmp_path / "run" / "README.md").write_text("another card")
    (tmp_path / "run" / "record.json").write_text("{}")
    found.append(run_fingerprint(again, "text"))
    assert found[0] == found[1]
    for changed in ("run/config.json", "run/model.safetensors", "run/tokenizer.json", "other/tokenizer.json"):
        (tmp_path / changed).write_bytes(b"other")
        found.append(run_fingerprint(again, "text"))
    assert len({*found, run_fingerprint(again, "other text")}) == 6


@pytest.mark.parametrize(
    "mistake",
    [
        {"data": {"text_files": ["nothere.txt"]}},
        {"data": {"block_size": 10**6}},
        {"data": {"block_size": 17}, "scheme": {"name": "original"}},
        {"scheme": {"name": "t6"}},
        {"scheme": {"name": "t5", "buckets": 8}},
        {"model": "nowhere", "tokenizer": "nowhere", "vocab_size": None},
        {"model": {**GPT2, "n_head": 3}},
        {"train": {"schedule": "linaer"}},
        {"train": {"positions": {"name": "pose", "max_length": 8}}},
    ],
    ids=str,
)
def test_what_cannot_run_leaves_a_finished_run_as_it_is(mistake: dict[str, Any], tmp_path: Path) -> None:
    finetune(config(tmp_path))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert any(CHECKPOINTS in path.parts for path in before)
    settings = config(tmp_path).model_dump()
    wrong = {key: {**settings[key], **value} if key in ("data", "train") else value for key, value in mistake.items()}
    wrong["overwrite"] = True
    with pytest.raises(PESwapError):
        finetune(config(tmp_path, **wrong))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_diverges_says_so_and_leaves_a_record_that_is_json(tmp_path: Path) -> None:
    section = config(tmp_path).train.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(DivergedError) as caught:
        finetune(config(tmp_path, train=section))
    assert str(caught.value) == (
        f"The training in '{tmp_path / 'run'}' diverged: its losses or weights are not finite, and the model saved there is of no use "
        "(train.learning_rate 1e+30). Train again with a lower --train.learning_rate, or more --train.warmup_steps."
    )
    content = (tmp_path / "run" / "record.json").read_text()
    assert "NaN" not in content
    assert "Infinity" not in content
    record = json.loads(content)
    assert (record["status"], record["perplexity"]["after_training"]) == ("diverged", None)
    assert record["training"]["log"][0]["loss"] is not None
    assert record["training"]["log"][-1]["loss"] is None


def test_the_card_says_at_which_length_a_model_was_fine_tuned(tmp_path: Path) -> None:
    finetune(config(tmp_path, data={**config(tmp_path).data.model_dump(), "block_size": 24}))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- Trained length before the swap: 16 positions.\n- Fine-tuned after the swap at: 24 tokens.\n" in card
    kept = config(tmp_path).train.model_copy(update={"max_steps": 0})
    finetune(config(tmp_path, train=kept, out=str(tmp_path / "kept")))
    assert "Fine-tuned" not in (tmp_path / "kept" / "README.md").read_text()


def test_a_model_saved_under_its_familys_own_class_is_trained_and_its_card_says_so(tmp_path: Path) -> None:
    """Its `config.json` holds no swap, and so nothing to write a card from."""
    llama = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    finetune(config(tmp_path, model=llama, scheme={"name": "rope", "base": 500.0}))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "llama"
    assert "- Fine-tuned after the swap at: 16 tokens.\n" in (tmp_path / "run" / "README.md").read_text()


def test_a_finished_run_may_be_done_again_and_leaves_no_old_checkpoint(tmp_path: Path) -> None:
    first = finetune(config(tmp_path))
    short = config(tmp_path).train.model_copy(update={"max_steps": 3})
    second = finetune(config(tmp_path, train=short, overwrite=True))
    assert (first["training"]["steps"], second["training"]["steps"]) == (6, 3)
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-3")


def test_no_steps_swap_and_save(tmp_path: Path) -> None:
    trained = finetune(config(tmp_path))
    none = config(tmp_path).train.model_copy(update={"max_steps": 0})
    again = config(tmp_path, model=str(tmp_path / "run"), vocab_size=None, train=none, out=str(tmp_path / "kept"))
    record = finetune(again.model_copy(update={"scheme": SchemeSection(name="original")}))
    assert (record["status"], record["training"]["steps"]) == ("done", 0)
    perplexity = record["perplexity"]
    assert perplexity["after_training"] is None
    assert perplexity["before_swap"] == perplexity["after_swap"] == trained["perplexity"]["after_training"]
    before, after = weights(tmp_path / "run"), weights(tmp_path / "kept")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "kept" / "tokenizer.json").exists()


def test_blocks_longer_than_the_models_table_are_refused(tmp_path: Path) -> None:
    data = {**config(tmp_path).data.model_dump(), "block_size": 17}
    with pytest.raises(ConfigError, match=r"data\.block_size is 17, but the model's positions end at 16"):
        finetune(config(tmp_path, scheme={"name": "original"}, data=data))
