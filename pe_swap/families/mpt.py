"""MPT: ALiBi, worked out by the model and handed to every layer; attention is written out by hand."""

from pe_swap.families.base import Stack, decoder, register
from pe_swap.families.native import Alibi

register(
    "mpt",
    Stack(
        Alibi("", "position_bias", "blocks.0.attn", length_field="max_seq_len"),
        attention="blocks.{layer}.attn",
        tokens="wte",
        is_causal=decoder,
        counts="mask",
        length_field="max_seq_len",
        guard_field="max_seq_len",
        no_limit=2**16,  # the model works its bias out at this length in every call
        attention_class="mpt:MptAttention",
        ids_from_mask=True,
    ),
)
