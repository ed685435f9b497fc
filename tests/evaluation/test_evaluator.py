"""From documents to rows: the same tokens for every model, whatever the batch size."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

from pe_swap.commands.evaluate import short_labels
from pe_swap.errors import ConfigError, DataError, UnknownNameError
from pe_swap.evaluation.evaluator import DIVERGED, Evaluator, by_position
from pe_swap.evaluation.measures import chosen
from pe_swap.evaluation.text import byte_ends
from pe_swap.runs.config import MeasureSection
from pe_swap.runs.config import build as build_config
from tests.support.models import TRAINED_LENGTH, VOCABULARY, build, swapped
from tests.support.words import DOCUMENTS, numbered_tokenizer


def evaluator(*, masked: bool = False, **measure: object) -> Evaluator:
    settings = {"lengths": [16, 32, 64], "protocols": ["nonoverlapping", "sliding", "same_targets"], "bootstrap_samples": 20}
    return Evaluator(DOCUMENTS, numbered_tokenizer(masked=masked), MeasureSection(**{**settings, **measure}))


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


def test_a_table_ends_and_a_rotation_goes_on() -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
    }
    llama = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=TRAINED_LENGTH)).eval()
    assert evaluator().measured(llama, "nonoverlapping", 64)["error"] is None
    # 40 rows, of which the first two are of padding (id 1) and before it.
    roberta = RobertaForMaskedLM(RobertaConfig(**sizes, max_position_embeddings=40, pad_token_id=1)).eval()
    rows = evaluator(lengths=[38, 39], masked=True).rows(roberta, "r", "original")
    assert rows[0]["error"] is None
    assert rows[1]["error"] == "39 tokens are more than the 38 positions this model has; swap it to go on"


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
    # Targets predicted from 1, 2, 3, 4 and 5 tokens, losses 8, 1, 3, 7 and 2.
    losses = [torch.tensor([8.0, 1.0]), torch.tensor([3.0, 7.0, 2.0])]
    found = by_position(losses, [torch.tensor([0, 1]), torch.tensor([2, 3, 4])], 5)
    assert found == [
        {"first": 1, "last": 1, "tokens": 1, "loss": 8.0},
        {"first": 2, "last": 2, "tokens": 1, "loss": 1.0},
        {"first": 3, "last": 4, "tokens": 2, "loss": 5.0},
        {"first": 5, "last": 5, "tokens": 1, "loss": 2.0},
    ]


@pytest.mark.parametrize("length", [1, 5, 16, 512])
def test_no_range_of_positions_reaches_beyond_the_length(length: int) -> None:
    found = by_position([torch.ones(length)], [torch.arange(length)], length)
    assert [part["last"] - part["first"] + 1 for part in found] == [part["tokens"] for part in found]
    assert found[-1]["last"] == length


def test_what_is_described_is_what_was_measured() -> None:
    cut = evaluator(max_documents=2, max_document_tokens=50, lengths=[16], protocols=["nonoverlapping"])
    assert [len(document) for document in cut.text().documents] == [50, 50]
    row = cut.measured(swapped("gpt2", "alibi"), "nonoverlapping", 16)
    assert (row["documents"], row["tokens"], row["document_tokens"]) == (2, 100, [50, 50])


def test_one_document_has_no_interval() -> None:
    row = evaluator(max_documents=1).measured(swapped("gpt2", "alibi"), "nonoverlapping", 16)
    assert row["perplexity"] is not None
    assert (row["ci_low"], row["ci_high"]) == (None, None)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"lengths": [16, 16]}, "'lengths' is .*: 16 is given twice; name each once"),
        ({"protocols": ["sliding", "sliding"]}, "sliding is given twice"),
        (
            {"lengths": [32, 16], "stride": 17},
            "'stride' is 17: a window of the shortest length has 16 targets; it must be at most",
        ),
        ({"lengths": [32, 16], "targets": 17}, "'targets' is 17: a window of the shortest length has 16 targets"),
    ],
)
def test_what_cannot_hold_is_refused(settings: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        build_config(MeasureSection, settings)


def test_names_of_measures_come_from_their_files() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown measure 'slidding'\. Did you mean 'sliding'"):
        chosen(MeasureSection(protocols=["slidding"]))
    with pytest.raises(ConfigError, match="options names 'sliding', which is not measured"):
        chosen(MeasureSection(protocols=["nonoverlapping"], options={"sliding": {}}))
    with pytest.raises(ConfigError, match="The options of the measure 'sliding': Unknown key 'x'"):
        chosen(MeasureSection(options={"sliding": {"x": 1}}))


def test_bits_per_byte_by_hand() -> None:
    model, documents = swapped("gpt2", "rope"), [[7, 8, 9, 10] * 8, [20, 30] * 12]
    settings = MeasureSection(lengths=[16], protocols=["nonoverlapping"], bootstrap_samples=20)
    ends = [[3 * index + 3 for index in range(len(document))] for document in documents]
    found = Evaluator(documents, numbered_tokenizer(), settings, 0, ends).measured(model, "nonoverlapping", 16)
    # Three bytes per token: a nat per token is 1 / (3 ln 2) bits per byte.
    assert found["bits_per_byte"] == pytest.approx(math.log(found["perplexity"]) / math.log(2) / 3, rel=1e-9)
    assert found["document_bytes"] == [3 * 32, 3 * 24]
    assert evaluator().measured(model, "nonoverlapping", 16)["bits_per_byte"] is None


def test_bytes_reach_from_one_tokens_end_to_the_next() -> None:
    # 'a', space, a letter of two bytes, a sign of four in two tokens, a last space: in characters 0-1, 2-3, 3-4, 3-4.
    assert byte_ends("a \xe9\U0001f600 ", [1, 3, 4, 4]) == [1, 4, 8, 9]


def test_labels_are_short_but_never_shared() -> None:
    assert short_labels(["a/rope", "b/alibi"]) == {"a/rope": "rope", "b/alibi": "alibi"}
    assert short_labels(["a/final", "b/final"]) == {"a/final": "a/final", "b/final": "b/final"}


def test_a_single_infinite_loss_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(model: object, inputs: object, targets: object, scored: torch.Tensor) -> torch.Tensor:
        found = torch.ones(int(scored.sum()), dtype=torch.float64)
        found[0] = float("inf")
        return found

    monkeypatch.setattr("pe_swap.evaluation.measures.base.target_losses", infinite)
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
