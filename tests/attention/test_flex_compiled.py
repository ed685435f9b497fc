"""FlexAttention as users get it on a CPU, with whatever transformers compiles: right at the lengths where PyTorch's kernel is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from pe_swap.attention.flex import flex_bias_attention
from pe_swap.errors import UnsupportedBackendError
from tests.support.models import ROUNDING, swapped, token_ids, with_cache

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers' own call
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # PyTorch's own import
]


def on_flex(case: str) -> PreTrainedModel:
    model = swapped("gpt2", case)
    model.config._attn_implementation = "flex_attention"
    return model


@pytest.mark.parametrize(("length", "case"), [(24, "alibi"), (104, "rope")])
@torch.no_grad()
def test_lengths_at_which_the_compiled_kernel_is_wrong(length: int, case: str) -> None:
    ids = token_ids(1, length)
    found = on_flex(case)(ids, use_cache=False).logits
    torch.testing.assert_close(found, swapped("gpt2", case)(ids, use_cache=False).logits, **ROUNDING)


@torch.no_grad()
def test_the_empty_tail_of_a_static_cache_is_not_read() -> None:
    ids, model = token_ids(1, 9), on_flex("alibi")
    cache = StaticCache(config=model.config, max_cache_len=24)
    parts = [model(part, **with_cache(model, cache)).logits for part in ids.split((8, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), swapped("gpt2", "alibi")(ids).logits, **ROUNDING)


@torch.no_grad()
def test_a_compiler_is_refused() -> None:
    query = torch.randn(1, 2, 24, 16)

    def attend(query: Tensor) -> Tensor:
        return flex_bias_attention(query, query, query, None, attention_mask=None, is_causal=True, scaling=0.25, training=False)

    attend(query)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=UnsupportedBackendError.__name__):
        torch.compile(attend, backend="eager", fullgraph=True)(query)
