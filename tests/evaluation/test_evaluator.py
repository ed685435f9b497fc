"""From documents to rows: the same tokens for every model, whatever the batch size."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from pe_swap.commands.evaluate import short_labels
from pe_swap.errors import DataError
from pe_swap.evaluation.evaluator import DIVERGED, Evaluator, by_position
from pe_swap.runs.config import MeasureSection
from tests.support.models import TRAINED_LENGTH, VOCABULARY, build, swapped

DOCUMENTS = [[5 + (index * index + 7 * document) % 80 for index in range(size)] for document, size in enumerate((150, 70, 33))]


def tokenizer(*, masked: bool = False) -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    masks = {"cls_token": "w1", "sep_token": "w2", "mask_token": "w3", "pad_token": "w4"}
    special = masks if masked else {"bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def evaluator(*, masked: bool = False, **measure: object) -> Evaluator:
    settings = {"lengths": [16, 32, 64], "protocols": ["nonoverlapping", "sliding", "same_targets"], "bootstrap_samples": 20}
    return Evaluator(DOCUMENTS, tokenizer(masked=masked), MeasureSection(**{**settings, **measure}))


def test_rows_of_a_swapped_model() -> None:
    rows = evaluator().rows(swapped("gpt2", "alibi"), "a", "alibi")
    assert [(row["protocol"], row["length"]) for row in rows] == [
        (protocol, length) for protocol in ("nonoverlapping", "sliding", "same_targets") for length in (16, 32, 64)
    ]
    # Every token behind the start token is scored once; same_targets takes 8 (half of 16) of the two documents that reach 64.
    assert [row["tokens"] for row in rows] == [253] * 6 + [16] * 3
    assert all(row["error"] is None and row["ci_low"] <= row["perplexity"] <= row["ci_high"] for row in rows)


def test_a_row_is_the_mean_of_the_models_own_losses() -> None:
    model, length = swapped("gpt2", "rope"), 32
    row = evaluator().measured(model, "nonoverlapping", length)
    total, count = 0.0, 0
    for document in DOCUMENTS:
        tokens = [1, *document]
        for start in range(0, len(tokens) - 1, length):
            window = torch.tensor([tokens[start : start + length + 1]])
            with torch.no_grad():
                total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    assert row["tokens"] == count
    assert math.log(row["perplexity"]) == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("protocol", ["nonoverlapping", "sliding", "same_targets"])
def test_the_batch_size_does_not_matter(protocol: str) -> None:
    model = swapped("gpt2", "t5")
    one, many = (evaluator(batch_tokens=size).measured(model, protocol, 32) for size in (1, 4096))
    assert one["tokens"] == many["tokens"]
    assert one["perplexity"] == pytest.approx(many["perplexity"], rel=1e-5)


def test_a_length_beyond_a_table_is_a_row_that_says_so() -> None:
    rows = evaluator(protocols=["nonoverlapping"]).rows(build("gpt2"), "control", "original")
    assert [row["error"] is None for row in rows] == [True, True, False]
    assert rows[2]["error"] == f"64 tokens are more than the {TRAINED_LENGTH} positions this model has; swap it to go on"
    assert rows[2]["perplexity"] is None


def test_text_too_short_for_every_length_is_an_error_and_for_one_a_row() -> None:
    model = swapped("gpt2", "alibi")
    rows = evaluator(lengths=[64, 512], protocols=["nonoverlapping"]).rows(model, "a", "alibi")
    assert rows[0]["error"] is None
    assert rows[1]["error"].startswith("No document has 512 tokens (the longest has 150)")
    with pytest.raises(DataError, match="Nothing can be measured on this text: No document has 512 tokens"):
        evaluator(lengths=[512, 1024]).rows(model, "a", "alibi")


def test_an_encoder_is_measured_on_the_same_masked_tokens_at_every_length() -> None:
    rows = evaluator(masked=True).rows(swapped("bert", "alibi"), "b", "alibi")
    assert [(row["protocol"], row["length"]) for row in rows] == [("masked", 16), ("masked", 32), ("masked", 64)]
    assert len({row["tokens"] for row in rows}) == 1
    assert 0 < rows[0]["tokens"] < 253 / 3


def test_an_encoder_without_a_mask_token_is_refused() -> None:
    with pytest.raises(DataError, match="no mask token"):
        evaluator().rows(swapped("bert", "alibi"), "b", "alibi")


def test_loss_by_position_in_powers_of_two() -> None:
    # Targets that see 1, 2, 3 and 4 tokens, losses 8, 1, 3 and 7.
    found = by_position([torch.tensor([8.0, 1.0]), torch.tensor([3.0, 7.0])], [torch.tensor([0, 1]), torch.tensor([2, 3])])
    assert found == [
        {"from": 1, "to": 1, "tokens": 1, "loss": 8.0},
        {"from": 2, "to": 3, "tokens": 2, "loss": 2.0},
        {"from": 4, "to": 7, "tokens": 1, "loss": 7.0},
    ]


def test_labels_are_short_but_never_shared() -> None:
    assert short_labels(["a/rope", "b/alibi"]) == {"a/rope": "rope", "b/alibi": "alibi"}
    assert short_labels(["a/final", "b/final"]) == {"a/final": "a/final", "b/final": "b/final"}


def test_a_single_infinite_loss_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(model: object, inputs: object, targets: object, scored: torch.Tensor) -> torch.Tensor:
        found = torch.ones(int(scored.sum()), dtype=torch.float64)
        found[0] = float("inf")
        return found

    monkeypatch.setattr("pe_swap.evaluation.evaluator.target_losses", infinite)
    assert evaluator().measured(swapped("gpt2", "alibi"), "nonoverlapping", 16)["error"] == DIVERGED


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_model_that_diverged_is_rows_that_say_so(value: float) -> None:
    model = swapped("gpt2", "alibi")
    torch.nn.init.constant_(model.transformer.ln_f.weight, value)
    rows = evaluator().rows(model, "a", "alibi")
    assert len(rows) == 9
    assert {row["error"] for row in rows} == {
        "the model's losses are not finite, or too large for a perplexity: it diverged. Train it again at a lower learning rate"
    }
    assert {row["perplexity"] for row in rows} == {None}
