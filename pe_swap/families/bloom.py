"""BLOOM: ALiBi, worked out by the model and handed to every layer; attention is written out by hand."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Alibi

register(
    "bloom",
    Stack(
        # Trained at 2,048 tokens (arXiv:2211.05100, table 3); no field of the configuration says so.
        Alibi("", "alibi", "h.0.self_attention", length=2048),
        attention="h.{layer}.self_attention",
        tokens="word_embeddings",
        is_causal=decoder,
        counts="mask",
        length_field=None,
        guard_field="pretraining_tp",
        attention_class="bloom:BloomAttention",
        ids_from_mask=True,
    ),
)
