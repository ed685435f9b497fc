"""CoPE's counts and vectors, pair by pair."""

import pytest
import torch

from pe_swap.errors import OptionError
from tests.references import cope as reference
from tests.support.schemes import build, geometry, positions

SMALL = geometry(hidden_size=24, num_heads=3, head_dim=8)


@pytest.mark.parametrize("num_positions", [3, 64])
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 9, 9), (6, 3, 9), (6, 3, 12)])
def test_scores_are_the_papers(num_positions: int, first_query: int, q_len: int, kv_len: int) -> None:
    scheme = build("cope", sizes=SMALL, num_positions=num_positions)
    table = torch.nn.init.normal_(scheme.tables["1"]).detach()
    query, key = torch.randn(2, 3, q_len, 8), torch.randn(2, 3, kv_len, 8)
    ours = scheme.score_bias(query, key, positions(first_query, q_len, kv_len), scaling=0.5, layer=1)
    seen = torch.arange(kv_len)[None] <= torch.arange(q_len)[:, None] + first_query
    expected = reference.score_term(query, key, table, first_query, 0.5)
    torch.testing.assert_close(ours.double() * seen, expected, atol=2e-5, rtol=0)


def test_counts_by_hand() -> None:
    scheme = build("cope", num_positions=4)
    zeros = torch.zeros(1, 12, 6, 64)  # every gate is one half
    counts = scheme.counts(zeros, zeros, positions(0, 6, 6), 1.0)[0, 0]
    assert counts[5].tolist() == [3.0, 2.5, 2.0, 1.5, 1.0, 0.5]
    assert counts[1].tolist() == [1.0, 0.5, 0, 0, 0, 0]
    assert scheme.counts(zeros + 100, zeros + 100, positions(0, 6, 6), 1.0)[0, 0, 5].tolist() == [3, 3, 3, 3, 2, 1]


def test_counts_keep_fractions_in_bf16_far_back() -> None:
    scheme = build("cope", num_positions=4096, sizes=SMALL)
    query, key = torch.randn(1, 3, 1, 8).bfloat16(), torch.randn(1, 3, 4000, 8).bfloat16()
    counts = scheme.counts(query, key, positions(3999, 1, 4000), 8**-0.5)
    exact = torch.sigmoid(query.double() @ key.double().transpose(-1, -2) * 8**-0.5).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(counts.double(), exact, atol=2e-2, rtol=0)  # sums near 2,000, float32


def test_start_is_zero_and_gradients_reach_gates_and_table() -> None:
    scheme = build("cope", num_positions=3)
    assert not any(parameter.any() for parameter in scheme.parameters())
    torch.nn.init.normal_(scheme.tables["0"])
    query, key = torch.randn(1, 12, 5, 64), torch.randn(1, 12, 5, 64, requires_grad=True)
    bias = scheme.score_bias(query, key, positions(0, 5, 5), scaling=0.125, layer=0)
    (bias * torch.randn_like(bias)).sum().backward()
    assert key.grad.abs().sum() > 0  # keys enter through their gates only
    assert scheme.tables["0"].grad.ne(0).any(dim=1).all()


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"cope: option 'num_positions' is 1; it must be an integer from 2"):
        build("cope", num_positions=1)
