"""BERT: a table added to the tokens inside `embeddings`, two-sided self-attention, causal as a decoder."""

from typing import Any

from transformers.models.bert import configuration_bert, modeling_bert

from pe_swap.families.base import FAMILIES, Family


def is_causal(config: Any) -> bool:
    """Return True for decoder use (`is_decoder=True`)."""
    return bool(config.is_decoder)


FAMILIES.register("bert")(
    Family(
        model_type="bert",
        modeling=modeling_bert,
        config_class=configuration_bert.BertConfig,
        pretrained_class=modeling_bert.BertPreTrainedModel,
        position_embedding="embeddings.position_embeddings",
        token_embedding="embeddings.word_embeddings",
        input_module="embeddings",
        self_attention="encoder.layer.{layer}.attention.self",
        length_field="max_position_embeddings",
        fills_token_type_ids=True,
        is_causal=is_causal,
    )
)
