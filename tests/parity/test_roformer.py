"""RoFormer is a BERT with interleaved rope, name for name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, RoFormerConfig, RoFormerForMaskedLM

import pe_swap
from tests.support.weights import LAYERS, LENGTH, TRAINED_LENGTH, VOCABULARY, randomize, token_ids

SIZES = {"hidden_size": 96, "num_attention_heads": 12, "num_hidden_layers": LAYERS, "intermediate_size": 64}


def pair(**options: Any) -> tuple[Any, Any]:
    """Return our model and RoFormer with the same weights."""
    theirs = RoFormerForMaskedLM(
        RoFormerConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, embedding_size=96, rotary_value=False)
    )
    table = theirs.roformer.encoder.embed_positions.weight.detach().clone()
    randomize(theirs)
    with torch.no_grad():
        theirs.roformer.encoder.embed_positions.weight.copy_(table)
    ours = BertForMaskedLM(BertConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=TRAINED_LENGTH)).eval()
    pe_swap.swap_positional(ours, "rope", **{"layout": "interleaved", **options})
    state = {name.replace("roformer.", "bert."): value for name, value in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert missing == ["bert.embeddings.position_embeddings.weight"]  # which stands for the table, and holds nothing
    assert unexpected == ["bert.encoder.embed_positions.weight"]
    return ours, theirs


@pytest.mark.parametrize("padding", [0, 13])
@torch.no_grad()
def test_logits_are_roformers(padding: int) -> None:
    ours, theirs = pair()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, LENGTH - padding :] = 0
    expected = theirs(token_ids(), attention_mask=mask).logits
    assert expected.std() > 0.2
    torch.testing.assert_close(
        ours(token_ids(), attention_mask=mask).logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("options", [{"layout": "half"}, {"base": 500.0}])
@torch.no_grad()
def test_another_rope_is_another_model(options: dict[str, Any]) -> None:
    ours, theirs = pair(**options)
    assert (ours(token_ids()).logits - theirs(token_ids()).logits).abs().max() > 1e-2
