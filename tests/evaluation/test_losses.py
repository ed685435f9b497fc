"""Losses through the head in chunks, against the models' own logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pe_swap.errors import UnsupportedModelError
from pe_swap.evaluation import losses
from pe_swap.evaluation.losses import check_head, target_hits, target_losses, vocabulary_head
from tests.support.models import VOCABULARY, build, swapped, token_ids

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"ffn_dim": 24, "head_dim": 8, "initializer_range": 0.8, "pad_token_id": 0}


def other(model_type: str, **config: object) -> PreTrainedModel:
    """Return a model of a family whose head has other modules, or does more, than GPT-2's."""
    torch.manual_seed(1)
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **SIZES, **config}
    if model_type == "opt":
        settings["word_embed_proj_dim"] = 16
    built = AutoConfig.for_model(model_type, **settings)
    auto = AutoModelForMaskedLM if model_type in ("distilbert", "roberta", "electra", "modernbert") else AutoModelForCausalLM
    return auto.from_config(built).eval()


MODELS = {
    "gpt2": lambda: build("gpt2"),
    "bert": lambda: build("bert"),
    "gpt2-rope": lambda: swapped("gpt2", "rope"),
    "bert-alibi": lambda: swapped("bert", "alibi"),
    "bert-decoder": lambda: build("bert-decoder"),
    "distilbert": lambda: other("distilbert", dim=16, hidden_dim=24, n_layers=1, n_heads=2),
    "roberta": lambda: other("roberta"),
    "electra": lambda: other("electra", embedding_size=12),
    "modernbert": lambda: other("modernbert"),
    "opt": lambda: other("opt"),
    "gemma2-caps": lambda: other("gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "cohere-scales": lambda: other("cohere", logit_scale=0.3),
}
"""Heads of one module and of several, with dense layers before the projection, caps and scales after it."""


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


def test_a_hit_is_the_models_own_choice() -> None:
    model, inputs, targets = build("gpt2"), token_ids(3, 20), token_ids(3, 20, seed=9)
    with torch.no_grad():
        chosen = model(inputs).logits.argmax(-1)
    targets[:, ::2] = chosen[:, ::2]
    scored = token_ids(3, 20, seed=10) % 3 > 0
    assert torch.equal(target_hits(model, inputs, targets, scored), (chosen == targets)[scored])


def test_shifted_targets_give_the_loss_that_training_sees() -> None:
    model, ids = build("gpt2"), token_ids(2, 21)
    found = target_losses(model, ids[:, :-1], ids[:, 1:], torch.ones(2, 20, dtype=torch.bool))
    assert float(found.mean()) == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def test_the_vocabulary_is_never_projected_for_more_rows_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_IN_A_CHUNK", 5 * VOCABULARY)
    model, rows = build("gpt2"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
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


def test_a_model_whose_head_takes_more_than_hidden_states_is_refused() -> None:
    class ReadsItsInput(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
            output = super().forward(input_ids, **kwargs)
            output.logits[..., 0] += input_ids
            return output

    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    model = ReadsItsInput(LlamaConfig(**settings, initializer_range=1.0)).eval()
    with pytest.raises(UnsupportedModelError, match="logits of ReadsItsInput depend on more than its last hidden states"):
        check_head(model)


def test_a_head_has_its_parameters_once_and_leaves_the_model_whole() -> None:
    model = MODELS["distilbert"]()
    head, base = vocabulary_head(model), model.base_model
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert sorted(names[id(parameter)].split(".")[0] for parameter in head.parameters()) == [
        "vocab_layer_norm", "vocab_layer_norm", "vocab_projector", "vocab_projector", "vocab_transform", "vocab_transform",
    ]  # fmt: skip
    head(torch.zeros(3, 16))
    assert model.base_model is base


def test_logits_that_are_not_finite_are_no_fault_of_the_head() -> None:
    model = build("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    check_head(model)
