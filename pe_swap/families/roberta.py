"""RoBERTa and three more: BERT's modules; position ids count tokens that are not padding, from the padding token's id plus 1."""

from pe_swap.families.base import Stack, as_configured, register
from pe_swap.families.native import Table
from pe_swap.families.native.table import after_padding

for model_type in ("roberta", "xlm-roberta", "camembert", "data2vec-text"):
    register(
        model_type,
        Stack(
            Table("embeddings.position_embeddings", first_row=after_padding),
            attention="encoder.layer.{layer}.attention.self",
            tokens="embeddings.word_embeddings",
            is_causal=as_configured,
            counts="tokens",
            first_id=after_padding,
            fills_token_type_ids=True,
        ),
    )
