"""What kernels for GPUs are handed. A device without numbers stands for a GPU, which takes the same way through the code.

`tests/interop/test_cuda.py` runs these kernels where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from pe_swap.attention import fused
from pe_swap.attention.fused import ALIGNED_BYTES, aligned, fused_attention, of_one_width
from pe_swap.attention.relative import CAUSAL_BLOCK, relative_bias_attention
from pe_swap.patching.layer_cache import cache_argument
from tests.support.families import token_ids
from tests.support.models import swapped_tiny

GPU = torch.device("meta")

Handed = list[dict[str, Any]]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Handed:
    """Return what PyTorch's fused attention is called with, call by call."""
    calls: Handed = []
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        calls.append({"query": query, "key": key, "value": value, **keywords})
        return original(query, key, value, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return calls


def fits(x: Tensor) -> bool:
    """Tell whether every row of queries, keys or values begins at, and is, a whole number of units."""
    unit = ALIGNED_BYTES // x.element_size()
    return x.stride(-1) == 1 and x.shape[-1] % unit == 0 and all(stride % unit == 0 for stride in x.stride()[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "beside"), [(8, 0), (8, 1), (64, 1), (9, 0), (7, 3)])
@pytest.mark.parametrize("first", [0, 3])
def test_rows_are_whole_units_and_begin_at_one(width: int, beside: int, first: int, dtype: torch.dtype, handed: Handed) -> None:
    """As the keys of fox, which lie beside a channel that it carries."""
    query, value = (torch.empty(2, 3, length, width, dtype=dtype, device=GPU) for length in (4, 12 - first))
    key = torch.empty(2, 3, 12, width + beside, dtype=dtype, device=GPU)[:, :, first:, :width]
    output = fused_attention(query, key, value, None, scaling=1.0, dropout=0.0)
    assert output.shape == (2, 3, 4, width)
    assert all(fits(handed[0][name]) for name in ("query", "key", "value"))


def test_what_is_aligned_has_the_same_numbers_and_is_left_alone_where_it_was() -> None:
    whole = torch.randn(2, 3, 12, 9)
    assert torch.equal(aligned(whole[..., :8]), whole[..., :8])
    assert fits(aligned(whole[..., :8]))
    fitting = torch.randn(2, 12, 3, 8).transpose(1, 2)
    assert aligned(fitting) is fitting
    offset = torch.randn(100)[2:98].view(1, 1, 12, 8)
    assert aligned(offset).storage_offset() == 0
    assert torch.equal(aligned(offset), offset)


def test_a_cpu_gets_no_wider_rows() -> None:
    x = torch.randn(1, 2, 5, 9)
    assert of_one_width(x, x, x)[0] is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_score_bias_stays_float32_beside_narrow_queries(dtype: torch.dtype, handed: Handed) -> None:
    query, mask = torch.empty(2, 3, 4, 8, dtype=dtype, device=GPU), torch.empty(1, 3, 4, 4, device=GPU)
    output = fused_attention(query, query, query, mask, scaling=1.0, dropout=0.0)
    assert output.dtype == dtype
    assert {handed[0][name].dtype for name in ("query", "key", "value", "attn_mask")} == {torch.float32}


def test_a_mask_without_a_bias_costs_no_precision_and_no_time(handed: Handed) -> None:
    query = torch.empty(2, 3, 4, 8, dtype=torch.bfloat16, device=GPU)
    for mask in (None, torch.ones(4, 4, dtype=torch.bool, device=GPU), torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16, device=GPU)):
        fused_attention(query, query, query, mask, scaling=1.0, dropout=0.0)
    assert {call["query"].dtype for call in handed} == {torch.bfloat16}


@pytest.mark.parametrize("q_len", [1, 12])
def test_a_bias_of_the_distance_is_in_the_queries_dtype_and_written_out(q_len: int, handed: Handed) -> None:
    query, key = (torch.empty(2, 3, length, 8, dtype=torch.bfloat16, device=GPU) for length in (q_len, 12))
    bias = torch.empty(3, q_len + 11, device=GPU)
    relative_bias_attention(query, key, key, bias, attention_mask=None, is_causal=q_len > 1, scaling=1.0, dropout=0.0)
    assert {handed[0][name].dtype for name in ("query", "key", "attn_mask")} == {torch.bfloat16}
    assert handed[0]["attn_mask"].stride(-1) == 1


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_no_bias_of_all_pairs_is_written_out_or_kept_for_the_backward_pass(
    trained: bool, is_causal: bool, handed: Handed
) -> None:
    length, heads = 2000, 3
    query, key = (torch.empty(1, heads, length, 8, device=GPU, requires_grad=True) for _ in range(2))
    bias = torch.empty(heads, 2 * length - 1, device=GPU, requires_grad=trained)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = relative_bias_attention(
            query, key, key, bias, attention_mask=None, is_causal=is_causal, scaling=1.0, dropout=0.0
        )
    assert len(handed) > 1
    assert all(call["attn_mask"].shape[2] <= CAUSAL_BLOCK for call in handed)
    assert sum(kept) < 20 * heads * length * 8
    forward = len(handed)
    output.sum().backward()
    assert len(handed) == 2 * forward, "blocks are computed again"
    assert all(x.grad is not None for x in (query, key, *([bias] if trained else [])))


def test_the_rounding_of_a_bias_of_the_distance_is_below_what_its_docstring_says() -> None:
    bias = -torch.logspace(-3, 2, 20_000)
    rounded = fused.distance_mask(bias, torch.empty(1, dtype=torch.bfloat16, device=GPU)).dtype
    change = (bias.to(rounded).float().exp() - bias.exp()).abs()
    assert rounded == torch.bfloat16
    assert 1e-3 < change.max() < 1.5e-3


@pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")
@pytest.mark.parametrize("case", ["none", "sinusoidal"])
def test_t5_hands_its_layers_a_zero_per_key(case: str, handed: Handed) -> None:
    """A mask whose keys are one number in memory is refused by kernels for GPUs; so a mask has all keys, or is none."""
    model, ids = swapped_tiny("t5", case), token_ids(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        encoded = model.get_encoder()(ids)
        for part in ids.split((5, 1, 3), dim=1):
            model(encoder_outputs=encoded, decoder_input_ids=part, use_cache=True, **{cache_argument(model): cache})
    assert all(call["attn_mask"] is None or call["attn_mask"].shape[-1] == call["key"].shape[2] for call in handed)
    assert any(call["attn_mask"] is not None for call in handed)
