"""Losses through the head in chunks, against the models' own logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pe_swap.errors import UnsupportedModelError
from pe_swap.evaluation import losses
from pe_swap.evaluation.losses import check_head, target_losses
from tests.support.models import VOCABULARY, build, swapped, token_ids

MODELS = {
    "gpt2": lambda: build("gpt2"),
    "bert": lambda: build("bert"),
    "gpt2-rope": lambda: swapped("gpt2", "rope"),
    "bert-alibi": lambda: swapped("bert", "alibi"),
    "bert-decoder": lambda: build("bert-decoder"),
}


@pytest.mark.parametrize("chunk", [VOCABULARY, 7 * VOCABULARY, 10**9])
@pytest.mark.parametrize("model", MODELS)
def test_chunked_loss_is_the_models_own(model: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_IN_A_CHUNK", chunk)
    built: PreTrainedModel = MODELS[model]()
    inputs, targets = token_ids(3, 20), token_ids(3, 20, seed=9)
    scored = token_ids(3, 20, seed=10) % 3 > 0
    with torch.no_grad():
        logits = built(inputs).logits
    expected = F.cross_entropy(logits[scored].double(), targets[scored], reduction="none")
    found = target_losses(built, inputs, targets, scored)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_shifted_targets_give_the_loss_that_training_sees() -> None:
    model, ids = build("gpt2"), token_ids(2, 21)
    found = target_losses(model, ids[:, :-1], ids[:, 1:], torch.ones(2, 20, dtype=torch.bool))
    assert float(found.mean()) == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def test_the_vocabulary_is_never_projected_for_more_rows_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_IN_A_CHUNK", 5 * VOCABULARY)
    model, rows = build("gpt2"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    target_losses(model, token_ids(1, 12), token_ids(1, 12), torch.ones(1, 12, dtype=torch.bool))
    assert rows == [5, 5, 2]


def test_a_known_distribution() -> None:
    # Zero weights: every token is equally likely, so every loss is the logarithm of the vocabulary's size.
    model = build("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = target_losses(model, token_ids(1, 6), token_ids(1, 6), torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(found, torch.full((6,), VOCABULARY, dtype=torch.float64).log(), atol=1e-6, rtol=0)


def test_a_model_without_a_vocabulary_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="BertModel has no vocabulary head"):
        check_head(BertModel(build("bert").config))


@pytest.mark.parametrize("model", MODELS)
def test_a_plain_head_passes(model: str) -> None:
    check_head(MODELS[model]())


def test_a_model_that_does_more_to_its_logits_is_refused() -> None:
    class Capped(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = torch.tanh(output.logits) * 0.1
            return output

    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    model = Capped(LlamaConfig(**settings, initializer_range=1.0)).eval()
    with pytest.raises(UnsupportedModelError, match="Capped does more to its logits than its vocabulary head does"):
        check_head(model)


def test_logits_that_are_not_finite_are_no_fault_of_the_head() -> None:
    model = build("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    check_head(model)
