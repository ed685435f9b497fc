"""xPos against the paper, pair by pair, near and far, in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pe_swap.attention.blockwise import blockwise_attention
from pe_swap.errors import OptionError
from pe_swap.schemes.positions import Positions
from pe_swap.schemes.xpos import Xpos
from tests.references import xpos as reference
from tests.support.schemes import at_positions, build, geometry, positions


def scores(scheme: Xpos, query: Tensor, key: Tensor, query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Return decayed scores as attention adds them up, in float32 at least."""
    turned_query = at_positions(scheme, query, query_ids[None], role="query", layer=0)
    turned_key = at_positions(scheme, key, key_ids[None], role="key", layer=0)
    where = Positions(query_ids, key_ids, query_ids[None], key_ids[None])
    bias = scheme.score_bias(turned_query, turned_key, where, scaling=0.5, layer=0)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return 0.5 * turned_query.to(wide) @ turned_key.to(wide).transpose(-1, -2) + bias


def xpos(head_dim: int, **options: object) -> Xpos:
    scheme = build("xpos", sizes=geometry(head_dim=head_dim, num_heads=2), **options)
    assert isinstance(scheme, Xpos)
    return scheme


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("gamma", "scale_base", "base"), [(0.4, 512, 10_000.0), (0.1, 20, 500.0)])
def test_is_the_papers(layout: str, gamma: float, scale_base: float, base: float) -> None:
    scheme = xpos(8, layout=layout, gamma=gamma, scale_base=scale_base, base=base)
    query, key, ids = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), torch.arange(40)
    found = scores(scheme, query, key, ids, ids)
    for i in (0, 7, 39):
        for j in range(0, i + 1, 3):
            wanted = 0.5 * reference.score(query[0, 1, i], key[0, 1, j], i, j, layout, base, gamma, scale_base)
            assert float(found[0, 1, i, j]) == pytest.approx(wanted, abs=2e-5)


def test_hand_numbers() -> None:
    # one plane: zeta = gamma / (1 + gamma) = 2 / 7; 512 positions apart the product of equal vectors is cos(512) * 2 / 7
    scheme = xpos(2)
    ones = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    found = scores(scheme, ones, ones, torch.tensor([600]), torch.tensor([88]))
    torch.testing.assert_close(found[0, 0, 0, 0], 0.5 * torch.tensor(512.0, dtype=torch.float64).cos().float() * 2 / 7)


@pytest.mark.parametrize("start", [0, 30_000, 10_000_000])
def test_a_score_depends_on_the_difference_alone_wherever_it_stands(start: int) -> None:
    scheme = xpos(8)
    query, key = torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    here = torch.arange(300)
    scheme.transform_query_key = lambda x, position_ids, *, role, layer: x  # float32 angles are another matter, that of rope
    near, far = (scores(scheme, query, key, here + at, here + at).tril() for at in (0, start))
    assert torch.equal(near, far)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_every_dtype_is_right_at_position_30000_and_beyond_what_factors_could_hold(dtype: torch.dtype, tolerance: float) -> None:
    # planes of equal zeta and no turning, so that the whole score is one power: 0.9375 ** (distance / 512)
    scheme = xpos(8, gamma=1e6)
    scheme._log_decay = [float(torch.tensor(0.9375, dtype=torch.float64).log()) / 512] * 4
    scheme._inv_freq = [0.0] * 4
    ones = torch.ones(1, 2, 1, 8, dtype=dtype)
    key_ids = torch.tensor([0, 100_000, 120_000, 129_488, 129_999, 130_000])
    found = scores(scheme, ones, ones.expand(1, 2, 6, 8), torch.tensor([130_000]), key_ids)
    wanted = 4.0 * 0.9375 ** ((130_000 - key_ids).double() / 512)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, 0, 0].double(), wanted, atol=4 * tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_attention_of_a_cached_step_at_position_30000(dtype: torch.dtype, tolerance: float) -> None:
    scheme = xpos(8)
    key_ids, query_ids = torch.arange(30_001), torch.tensor([30_000])
    query, key, value = (torch.randn(1, 2, length, 8).to(dtype) for length in (1, 30_001, 30_001))
    query = at_positions(scheme, 2 * query, query_ids[None], role="query", layer=0)
    key = at_positions(scheme, 2 * key, key_ids[None], role="key", layer=0)
    found = blockwise_attention(
        query,
        key,
        value,
        Positions(query_ids, key_ids, query_ids[None], key_ids[None]),
        lambda query, key, positions: scheme.score_bias(query, key, positions, scaling=8**-0.5, layer=0),
        None,
        attention_mask=None,
        is_causal=False,
        scaling=8**-0.5,
        dropout=0.0,
    )
    zeta = ((torch.arange(4).double() / 4 + 0.4) / 1.4).repeat_interleave(2)
    decay = zeta ** ((30_000 - key_ids).double()[:, None] / 512)
    probabilities = ((query.double() * decay * key.double()).sum(-1) * 8**-0.5).softmax(-1)
    expected = (probabilities[..., None] * value.double()).sum(2, keepdim=True)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=2**-8 if dtype == torch.bfloat16 else 0)


def test_a_chunk_of_a_cache_is_a_part_of_the_whole() -> None:
    scheme = xpos(8, scale_base=20)
    query, key, ids = torch.randn(1, 2, 600, 8), torch.randn(1, 2, 600, 8), torch.arange(600)
    whole = scores(scheme, query, key, ids, ids)
    for start, stop in ((599, 600), (100, 356)):
        part = scores(scheme, query[:, :, start:stop], key, ids[start:stop], ids)
        seen = ids[None] <= ids[start:stop, None]
        torch.testing.assert_close(part[0][:, seen], whole[0, :, start:stop][:, seen], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
@pytest.mark.parametrize(("first", "q_len"), [(0, 256), (5000, 256), (30_000, 1)])
def test_decayed_queries_and_keys_say_what_the_bias_says(dtype: torch.dtype, tolerance: float, first: int, q_len: int) -> None:
    scheme, kv_len = xpos(8), first + q_len
    query, key = torch.randn(1, 2, q_len, 8).to(dtype), torch.randn(1, 2, kv_len, 8).to(dtype)
    here = positions(first, q_len, kv_len)
    plain = query.double() @ key.double().transpose(-1, -2)
    expected = (plain + scheme.score_bias(query, key, here, scaling=1.0, layer=0)).tril(first)
    pair = scheme.fold_bias_into_query_key(query, key, here, scaling=1.0, layer=0)
    assert pair is not None
    found = (pair[0].double() @ pair[1].double().transpose(-1, -2)).tril(first)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    assert (expected - plain.tril(first)).abs().max() > 1


def test_a_steep_decay_is_left_to_the_bias() -> None:
    scheme = xpos(8, gamma=0.01, scale_base=1)
    query, key = torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    assert scheme.fold_bias_into_query_key(query, key, positions(0, 300, 300), scaling=1.0, layer=0) is None
    assert scheme.fold_bias_into_query_key(query[:, :, -1:], key, positions(299, 1, 300), scaling=1.0, layer=0) is not None


def test_keys_that_nobody_sees_stay_finite_and_have_no_gradient_of_their_own() -> None:
    scheme = xpos(8)
    query = torch.randn(1, 2, 1, 8, requires_grad=True)
    key = torch.randn(1, 2, 3, 8, requires_grad=True)
    found = scores(scheme, query, key, torch.tensor([5]), torch.tensor([0, 5, 10_000_000]))
    assert found.isfinite().all()
    found.sum().backward()
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()


@pytest.mark.parametrize(("gamma", "scale_base"), [(0.01, 1), (1e-9, 0.5), (0.4, 2)])
def test_a_steep_decay_stays_right_for_many_queries_at_once(gamma: float, scale_base: float) -> None:
    scheme = xpos(8, gamma=gamma, scale_base=scale_base)
    query, key, ids = torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8), torch.arange(300)
    found = scores(scheme, query, key, ids, ids)
    assert found.isfinite().all()
    for i in (0, 150, 299):
        for j in range(max(0, i - 5), i + 1):
            wanted = 0.5 * reference.score(query[0, 1, i], key[0, 1, j], i, j, "interleaved", 1e4, gamma, scale_base)
            assert float(found[0, 1, i, j]) == pytest.approx(wanted, abs=1e-4)


def test_decays_are_the_authors() -> None:
    scheme = xpos(64)
    expected = (torch.arange(0, 64, 2) + 0.4 * 64) / (1.4 * 64)
    torch.testing.assert_close((scheme.log_decay(torch.device("cpu"))[::2] * 512).exp(), expected)


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"xpos: option 'scale_base' is 0; it must be a number above 0"):
        build("xpos", scale_base=0)
    with pytest.raises(OptionError, match=r"'gamma' is 0; it must be a number above 0"):
        build("xpos", gamma=0)
    with pytest.raises(OptionError, match=r"xpos: head_dim 15 x fraction 1.0 gives 15 rotary dimensions; they must be an even"):
        build("xpos", sizes=geometry(head_dim=15))
