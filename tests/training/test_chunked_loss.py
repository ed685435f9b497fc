"""The loss in chunks is the model's own loss, with its gradients, and holds no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForNextSentencePrediction

from pe_swap.errors import UnsupportedModelError
from pe_swap.training import chunked_loss as training_loss
from pe_swap.training.chunked_loss import loss_in_chunks
from tests.support.families import is_causal, tiny
from tests.support.memory import Largest
from tests.support.models import MATRIX_FAMILIES, VOCABULARY, build, swapped, token_ids

ROWS = 7
"""Rows a chunk: not a divisor of anything here."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loss, "LOGITS_IN_A_CHUNK", ROWS * VOCABULARY)


def batch(form: str) -> dict[str, Any]:
    ids = token_ids(3, 20)
    labels = ids.clone()
    labels[0, :9] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if form == "shifted":
        inputs["shift_labels"] = labels.roll(-1, 1)
    if form == "counted":
        inputs["num_items_in_batch"] = 77
    return inputs


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (loss * 3).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model: Any, inputs: dict[str, Any], is_masked: bool) -> Tensor:
    logits, labels = model(inputs["input_ids"]).logits, inputs["labels"]
    if not is_masked:
        logits, labels = (logits, inputs["shift_labels"]) if "shift_labels" in inputs else (logits[:, :-1], labels[:, 1:])
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / inputs.get("num_items_in_batch", (labels != -100).sum())


@pytest.mark.parametrize("family", MATRIX_FAMILIES)
@pytest.mark.parametrize("form", ["plain", "shifted", "counted"])
@pytest.mark.parametrize("has_torchs", [True, False])
def test_loss_and_gradients_are_the_models_own(family: str, form: str, has_torchs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_torchs:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    if form == "shifted" and not is_causal(family):
        form = "plain"  # a masked loss has no shifted labels
    model = swapped(family, "t5").train()
    inputs = batch(form)
    expected = reference(model, inputs, is_masked=not is_causal(family))
    if form != "counted" or is_causal(family):  # transformers' BERT ignores the count
        torch.testing.assert_close(model(**inputs).loss, expected)
    gradients = gradients_of(model, expected)
    with loss_in_chunks(model):
        output = model(**inputs)
        assert output.logits is None
        ours = gradients_of(model, output.loss)
    torch.testing.assert_close(output.loss, expected)
    assert ours.keys() == gradients.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert model(**inputs).logits is not None


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch has its own loss in chunks from 2.13 on")
@pytest.mark.parametrize(("family", "is_plain"), [("gpt2", True), ("llama", True), ("bert", False), ("gemma2", False)])
def test_torchs_own_loss_takes_heads_of_one_linear_layer(family: str, is_plain: bool) -> None:
    model = tiny(family)
    hidden = torch.randn(3, model.config.hidden_size)
    assert (training_loss.plain_projection(model, hidden) is not None) == is_plain
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, output: 2.0 * output)
    assert training_loss.plain_projection(model, hidden) is None, "the layer would not be called, and so neither would its hook"
    hook.remove()
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: None)
    assert training_loss.plain_projection(model, hidden) is None, "tools bring a weight so, for the layer's own call"
    hook.remove()
    assert (training_loss.plain_projection(model, hidden) is not None) == is_plain
    assert training_loss.plain_projection(model.to(torch.bfloat16), hidden.bfloat16()) is None


def test_no_tensor_of_tokens_by_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    model, ids = build("gpt2", n_positions=128).train(), token_ids(8, 100)
    sizes = []
    for chunked in (False, True):
        with Largest(VOCABULARY) as largest:
            if chunked:
                with loss_in_chunks(model):
                    model(ids, labels=ids).loss.backward()
            else:
                model(ids, labels=ids).loss.backward()
        sizes.append(largest.rows)
    assert sizes == [800, 96]  # in chunks, the widest is the gradient of the head's weight, hidden_size x vocabulary


def test_calls_without_labels_and_without_gradients_are_the_models_own() -> None:
    model, ids = build("gpt2"), token_ids(2, 20)
    expected = model(ids).logits
    with loss_in_chunks(model), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids, labels=ids).logits, expected)


def test_another_loss_is_refused() -> None:
    model = BertForNextSentencePrediction(build("bert").config)
    with (
        pytest.raises(UnsupportedModelError, match=r"BertForNextSentencePrediction has the loss 'None'; a loss in chunks is"),
        loss_in_chunks(model),
    ):
        pass
