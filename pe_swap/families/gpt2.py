"""GPT-2: a table `wpe` added to the tokens, causal self-attention, optional cross-attention (left alone)."""

from typing import Any

from transformers.models.gpt2 import configuration_gpt2, modeling_gpt2

from pe_swap.families.base import FAMILIES, Family


def is_causal(config: Any) -> bool:
    """Return True unless the configuration says `is_causal=False`, which makes transformers' masks two-sided."""
    return bool(getattr(config, "is_causal", True))


FAMILIES.register("gpt2")(
    Family(
        model_type="gpt2",
        modeling=modeling_gpt2,
        config_class=configuration_gpt2.GPT2Config,
        pretrained_class=modeling_gpt2.GPT2PreTrainedModel,
        position_embedding="wpe",
        token_embedding="wte",
        input_module="",
        self_attention="h.{layer}.attn",
        length_field="max_position_embeddings",
        fills_token_type_ids=False,
        is_causal=is_causal,
    )
)
