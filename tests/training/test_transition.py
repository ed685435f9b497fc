"""Transitions: what is matched is what a computation by hand gives, old positions go exactly, a killed run resumes bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

import pe_swap
from pe_swap.commands.compare import finetune_config
from pe_swap.commands.finetune import finetune
from pe_swap.errors import CheckpointError, ConfigError
from pe_swap.patching.install import holders_of
from pe_swap.runs.config import CompareConfig, FinetuneConfig, TransitionSection
from pe_swap.runs.config import build as build_config
from pe_swap.training.batches import causal_batch
from pe_swap.training.chunked_loss import loss_in_chunks
from pe_swap.training.trainer import PositionalTrainer
from pe_swap.training.transition import Transition, attention_modules, require_fading, teacher_of
from tests.support.families import TRAINED_LENGTH, tiny, token_ids
from tests.support.finetuning import WORDS, KilledError, killed_after, weights
from tests.support.models import build, checkpoint_activations, logits
from tests.support.words import word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
TRAIN = {"max_steps": 6, "batch_size": 4, "save_steps": 3, "logging_steps": 1, "warmup_steps": 1, "learning_rate": 1e-2}
ATTENTION = {"match": "attention", "match_share": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that was trained for a few steps, with its texts beside it."""
    folder = tmp_path_factory.mktemp("transition")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(WORDS * 20 + name, encoding="utf-8")
    finetune(run(folder, model=GPT2, vocab_size=300, scheme={"name": "original"}, out=str(folder / "base")))
    return folder


def run(folder: Path, **changes: Any) -> FinetuneConfig:
    settings = {
        "model": str(folder / "base"),
        "scheme": {"name": "t5", "num_buckets": 8},
        "data": {"text_files": [str(folder / f"{name}.txt") for name in "ab"], "block_size": 16},
        "train": TRAIN,
    }
    return build_config(FinetuneConfig, {**settings, **changes})


def transition(**section: Any) -> dict[str, Any]:
    return {**TRAIN, "transition": section}


def batch() -> dict[str, Tensor]:
    return causal_batch([{"input_ids": row.tolist()} for row in token_ids(4, TRAINED_LENGTH + 1)])


def loss_and_gradients(student: PreTrainedModel, teacher: PreTrainedModel, **section: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a matching step on a batch, and its gradients."""
    recipe = Transition(TransitionSection(**section), teacher, 4)
    with recipe.of(student, batch()), loss_in_chunks(student, recipe.objective):
        recipe.begin(0)
        loss = student.train()(**batch()).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def outputs(model: PreTrainedModel) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return what every attention module of a model returns on the batch, its last hidden states, and its logits, by hooks of the test."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: found.append(output[0])) for module in attention_modules(model)
    ]
    result = model(batch()["input_ids"], output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return found, result.hidden_states[-1], result.logits


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_what_is_matched_is_what_a_computation_by_hand_gives(family: str) -> None:
    teacher = build(family).eval()
    student = pe_swap.swap_positional(copy.deepcopy(teacher), "alibi")
    theirs, our_losses = outputs(teacher), {}
    for match in ("attention", "hidden", "logits"):
        mine = copy.deepcopy(student).train()
        own = outputs(mine)
        if match == "logits":
            p = theirs[2].detach().log_softmax(-1)
            expected = (p.exp() * (p - own[2].log_softmax(-1))).sum(-1).mean()
        else:
            pairs = zip(own[0], theirs[0], strict=True) if match == "attention" else [(own[1], theirs[1])]
            errors = [(a - b.detach()).square().mean() / b.detach().square().mean() for a, b in pairs]
            expected = torch.stack(errors).mean()
        expected.backward()
        wanted = {name: p.grad.clone() for name, p in mine.named_parameters() if p.grad is not None}
        found, gradients = loss_and_gradients(copy.deepcopy(student), copy.deepcopy(teacher), match=match)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-7)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6)
        our_losses[match] = float(found)
    assert min(our_losses.values()) > 1e-4


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    teacher = build("gpt2")
    student = pe_swap.swap_positional(copy.deepcopy(teacher), "learned", max_length=64, extend="tile")
    for match in ("attention", "hidden", "logits"):
        loss, gradients = loss_and_gradients(copy.deepcopy(student), copy.deepcopy(teacher), match=match)
        assert abs(float(loss)) < 1e-6
        assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-6


def test_attention_is_fed_with_the_teachers_hidden_states_where_that_is_asked_for() -> None:
    teacher = build("llama")
    student = pe_swap.swap_positional(copy.deepcopy(teacher), "rope")
    with torch.no_grad():
        student.model.embed_tokens.weight.mul_(-2.0)
    found = {}
    for match_input in ("own", "teacher"):
        mine = copy.deepcopy(student)
        checkpoint_activations(mine)
        loss, gradients = loss_and_gradients(mine, copy.deepcopy(teacher), match="attention", match_input=match_input)
        found[match_input] = float(loss)
        if match_input == "teacher":
            assert set(gradients) <= {name for name, _ in mine.named_parameters() if ".self_attn." in name}
    assert found["own"] > 0.1
    assert found["teacher"] < 1e-10


def test_weights_that_do_not_train_are_shared_with_the_teacher() -> None:
    model = build("gpt2")
    section = TransitionSection(match="attention", match_trains="attention")
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in teacher_of(model, section).parameters()}
    own = {p.data_ptr() for module in attention_modules(model) for p in module.parameters()}
    assert shared == {p.data_ptr() for p in model.parameters()} - own
    for other in ({"match": "attention"}, {"match": "attention", "match_trains": "attention", "then": "logits"}):
        teacher = teacher_of(model, TransitionSection(**other))
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in teacher.parameters()}
        assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_matches_first_and_reads_text_afterwards(base: Path, tmp_path: Path) -> None:
    plain = finetune(run(base, out=str(tmp_path / "plain")))["training"]
    matched = finetune(run(base, train=transition(**ATTENTION, match_learning_rate=1e-4), out=str(tmp_path / "matched")))[
        "training"
    ]
    assert [row["objective"] for row in plain["log"]] == ["cross_entropy"] * 6
    assert [row["objective"] for row in matched["log"]] == ["attention"] * 3 + ["cross_entropy"] * 3
    errors = [row["loss"] for row in matched["log"][:3]]
    assert 0 < errors[2] < errors[0]
    assert matched["train_loss"] == pytest.approx(sum(row["loss"] for row in matched["log"][3:]) / 3, rel=1e-4)
    distilled = finetune(run(base, train=transition(then="logits"), out=str(tmp_path / "distilled")))["training"]
    assert [row["objective"] for row in distilled["log"]] == ["logits"] * 6


@pytest.mark.parametrize("match_trains", ["all", "attention"])
def test_a_killed_run_with_matching_resumes_bit_for_bit(
    match_trains: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"match": "attention", "match_share": 0.8, "match_trains": match_trains, "match_learning_rate": 3e-3}
    train = {**transition(**recipe), "gradient_checkpointing": True, "save_steps": 2, "logging_steps": 4}
    if match_trains == "all":
        train["positional_learning_rate"] = 0.03
    whole = finetune(run(base, train=train, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(KilledError):
            finetune(run(base, train=train, out=str(tmp_path / "run")))
    resumed = finetune(run(base, train=train, out=str(tmp_path / "run"), resume=True))
    assert resumed["training"] == whole["training"]
    expected, found = (weights(tmp_path / name) for name in ("whole", "run"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("positional", [None, 0.04])
def test_rates_while_matching(positional: float | None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what the swap adds has its own peak rate; the schedule goes on over all steps."""
    seen: list[dict[bool, float]] = []
    original = PositionalTrainer.training_step

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({bool(group["is_added"]): group["lr"] for group in self.optimizer.param_groups})
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PositionalTrainer, "training_step", noting)
    train = {**transition(**ATTENTION, match_learning_rate=1e-4), "positional_learning_rate": positional}
    train |= {"warmup_steps": 0, "schedule": "linear", "logging_steps": 2}
    log = finetune(run(base, train=train, out=str(tmp_path / "run")))["training"]["log"]
    shape = [1 - step / 6 for step in range(6)]
    rest = [1e-4 * share for share in shape[:3]] + [1e-2 * share for share in shape[3:]]
    assert [rates[False] for rates in seen] == pytest.approx(rest)
    assert [rates[True] for rates in seen] == pytest.approx([(positional or 1e-2) * share for share in shape])
    assert [(row["step"], row["objective"]) for row in log] == [
        (2, "attention"), (3, "attention"), (4, "cross_entropy"), (6, "cross_entropy")
    ]  # fmt: skip


def test_a_decoder_without_a_head_is_matched_on_whole_blocks(base: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(base / "base").save_pretrained(tmp_path / "body")
    recipe = {"match": "hidden", "match_share": 1.0}
    settings = {"model": str(tmp_path / "body"), "tokenizer": str(base / "base"), "train": transition(**recipe)}
    record = finetune(run(base, **settings, out=str(tmp_path / "run")))
    assert len(record["training"]["log"]) == 6  # blocks of one token more would end beyond its table


def test_only_attention_trains_where_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    recipe = {"match": "attention", "match_share": 1.0, "match_trains": "attention"}
    finetune(run(base, train=transition(**recipe), out=str(tmp_path / "run")))
    before, after = weights(base / "base"), weights(tmp_path / "run")
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    moved = {name for name in before if name in after and name not in same}
    assert {"attn" if ".attn." in name else name for name in moved} == {"attn", "transformer.wpe.weight"}, moved
    assert not any(".attn." in name and name.endswith("c_attn.weight") for name in same)


def test_matching_is_the_same_in_small_batches(base: Path, tmp_path: Path) -> None:
    found = []
    for label, batches in (("one", {}), ("two", {"batch_size": 2, "gradient_accumulation_steps": 2})):
        train = {
            **transition(**ATTENTION, then="logits"),
            **batches,
            "bf16": False,
        }  # whose roundings depend on the batch, on a GPU
        log = finetune(run(base, train=train, out=str(tmp_path / label)))["training"]["log"]
        found.append([row["loss"] for row in log])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_sentence_encoder_is_matched_without_a_head_for_words(base: Path, tmp_path: Path) -> None:
    encoder = AutoModel.from_config(build("bert").config)
    encoder.save_pretrained(tmp_path / "encoder")
    word_tokenizer("bert").save_pretrained(tmp_path / "encoder")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{5 + index * index % 80}" for index in range(300)) + name)
    data = {"text_files": [str(tmp_path / f"{name}.txt") for name in "ab"], "block_size": 16}
    recipe = {"match": "hidden", "match_share": 1.0, "match_learning_rate": 1e-3}
    settings = {"model": str(tmp_path / "encoder"), "data": data}
    record = finetune(run(base, **settings, train=transition(**recipe), out=str(tmp_path / "run")))
    errors = [row["loss"] for row in record["training"]["log"]]
    assert errors[-1] < errors[0]
    assert "perplexity" not in record
    tokens = token_ids(2, 16)
    cosines = []
    for one in (
        pe_swap.swap_positional(copy.deepcopy(encoder), "t5", num_buckets=8),
        AutoModel.from_pretrained(tmp_path / "run"),
    ):
        with torch.no_grad():
            states, wanted = one.eval()(tokens).last_hidden_state, encoder.eval()(tokens).last_hidden_state
        cosines.append(float(torch.cosine_similarity(states.mean(1), wanted.mean(1)).mean()))
    assert cosines[1] > cosines[0]
    with pytest.raises(CheckpointError, match="has no weights for cls"):
        finetune(run(base, **settings, train=transition(match="hidden"), out=str(tmp_path / "with_text")))


# --- Fading ---


@pytest.mark.parametrize("family", ["gpt2", "roberta", "llama", "gemma3_text", "bloom", "mpt"])
@pytest.mark.filterwarnings("ignore:.*leaves no order of tokens")
def test_all_of_the_old_positions_beside_none_are_the_unswapped_model(family: str) -> None:
    model, tokens = tiny(family).eval(), token_ids(2, 20)
    expected = logits(model, tokens)
    for keep_mean in {False, family in ("gpt2", "roberta")}:
        mine = pe_swap.swap_positional(copy.deepcopy(model), "none", keep_mean=keep_mean)
        without = logits(mine, tokens)
        (holder,) = holders_of(mine)
        holder.fade = 1.0
        torch.testing.assert_close(logits(mine, tokens), expected, rtol=1e-4, atol=2e-5)
        holder.fade = 0.5
        half = logits(mine, tokens)
        assert not torch.allclose(half, expected, atol=1e-4)
        assert not torch.allclose(half, without, atol=1e-4)
        holder.fade = 0.0
        assert torch.equal(logits(mine, tokens), without)


def test_old_positions_go_gradually_and_are_gone_at_the_end(base: Path, tmp_path: Path) -> None:
    train = {**transition(fade_steps=4), "eval_steps": [1, 2, 4], "eval_lengths": [32]}
    record = finetune(run(base, train=train, out=str(tmp_path / "run")))
    rows = record["perplexity"]["by_step"]
    assert [row["faded"] for row in rows[::2]] == [0.0, 0.75, 0.5, 0.0, 0.0]
    # While the table of 16 acts, there is no length of 32.
    assert [row["perplexity"] is None for row in rows[1::2]] == [False, True, True, False, False]
    plain = finetune(run(base, train={**TRAIN, "eval_steps": [1, 2, 4]}, out=str(tmp_path / "plain")))
    pairs = zip(rows[::2], plain["perplexity"]["by_step"], strict=True)
    assert [mine["perplexity"] == other["perplexity"] for mine, other in pairs] == [True, False, False, False, False]


# --- Refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transition": {"match_share": 0.5}}, "match_share is given and match is none"),
        ({"transition": {"match": "hidden", "match_input": "teacher"}}, "which is for match: attention"),
        ({"transition": {"match": "attention", "match_share": 0}}, "greater than 0"),
        ({"transition": {"fade_steps": 7}}, "fade_steps is 7, and training ends at step 6"),
        ({"transition": {"match": "attention", "match_input": "teacher"}}, "adds its positions to its hidden states"),
        ({"transition": ATTENTION, "positions": {"name": "pose", "max_length": 64}}, "was not trained at the positions"),
        ({"transition": {"fade_steps": 3}, "scheme": {"name": "learned", "max_length": 64}}, "starts from the old table"),
        ({"transition": ATTENTION, "scheme": {"name": "original"}}, "which goes nowhere"),
        ({"transition": ATTENTION, "block_size": 20}, "positions end at 16, and data.block_size is 20"),
        ({"transition": ATTENTION, "model": GPT2, "vocab_size": 300}, "starts with random weights"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    beside = {key: value for key, value in changes.items() if key not in ("transition", "positions", "block_size")}
    train = {**TRAIN, **{key: value for key, value in changes.items() if key in ("transition", "positions")}}
    data = {"text_files": [str(base / f"{name}.txt") for name in "ab"], "block_size": changes.get("block_size", 16)}
    with pytest.raises(ConfigError, match=message):
        finetune(run(base, train=train, data=data, out=str(tmp_path / "run"), **beside))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", [ATTENTION, {"then": "logits"}, {"fade_steps": 2}], ids=str)
def test_a_model_that_was_loaded_already_swapped_has_no_teacher(section: dict[str, Any], base: Path, tmp_path: Path) -> None:
    finetune(run(base, train={**TRAIN, "max_steps": 0}, out=str(tmp_path / "swapped")))
    with pytest.raises(ConfigError, match="was loaded already swapped: its own positions are gone"):
        finetune(run(base, model=str(tmp_path / "swapped"), train=transition(**section), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_teacher_beside_weights_that_a_launcher_splits_is_refused(
    variable: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=r"the launcher splits the weights .* Launch with --multi_gpu"):
        finetune(run(base, train=transition(**ATTENTION), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_old_rotations_do_not_fade_beside_new_ones() -> None:
    for rope in ({"rope_type": "yarn", "factor": 8.0}, {"rope_type": "dynamic", "factor": 2.0}):
        scaled = build("llama", rope_parameters={"rope_theta": 1e4, **rope})
        with pytest.raises(ConfigError, match="scales scores or depends on the length"):
            require_fading(pe_swap.swap_positional(scaled, "alibi"))
    require_fading(pe_swap.swap_positional(build("llama"), "alibi"))
    for scheme, options in (("rope", {"base": 500.0}), ("xpos", {})):
        with pytest.raises(ConfigError, match="and so does the old rotation"):
            require_fading(pe_swap.swap_positional(build("llama"), scheme, **options))


def test_a_comparison_has_a_transition_per_scheme_and_none_for_the_control() -> None:
    config = build_config(
        CompareConfig,
        {
            "train": transition(fade_steps=2),
            "schemes": {
                "control": {"name": "original"},
                "rope": {"name": "rope", "keep_mean": True},
                "matched": {"name": "rope", "base": 50.0, "transition": ATTENTION},
            },
        },
    )
    found = {label: finetune_config(config, "m", scheme, 0, Path("x")) for label, scheme in config.schemes.items()}
    assert found["control"].train.transition == TransitionSection()
    assert found["rope"].train.transition == TransitionSection(fade_steps=2)
    assert found["matched"].train.transition == TransitionSection(**ATTENTION)
    assert found["rope"].scheme.keep_mean
    assert found["matched"].scheme.options == {"base": 50.0}
    assert json.loads(found["matched"].model_dump_json())["scheme"].keys() == {"name", "layers", "plan", "keep_mean", "base"}
