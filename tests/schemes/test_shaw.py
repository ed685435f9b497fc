"""Shaw's relative vectors, pair by pair."""

import pytest
import torch

from pe_swap.errors import OptionError
from tests.references import shaw as reference
from tests.support.schemes import build, positions


@pytest.mark.parametrize("variant", ["key", "key_query"])
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 9, 9), (6, 3, 9), (8, 1, 9)])
def test_scores_are_the_papers(variant: str, first_query: int, q_len: int, kv_len: int) -> None:
    scheme = build("shaw", max_distance=4, variant=variant)
    table = torch.nn.init.normal_(scheme.key_tables["1"])
    query, key = torch.randn(2, 12, q_len, 64), torch.randn(2, 12, kv_len, 64)
    ours = scheme.score_bias(query, key, positions(first_query, q_len, kv_len), scaling=0.125, layer=1)
    expected = reference.score_term(query, key, table.detach(), first_query, 4, 0.125, variant == "key_query")
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=0)


def test_values_are_the_papers() -> None:
    scheme = build("shaw", max_distance=3, value=True)
    table = torch.nn.init.normal_(scheme.value_tables["0"])
    probabilities = torch.randn(2, 12, 4, 9).softmax(-1)
    ours = scheme.value_bias(probabilities, positions(5, 4, 9), layer=0)
    torch.testing.assert_close(ours.double(), reference.value_term(probabilities, table.detach(), 5, 3), atol=1e-5, rtol=0)


def test_sign_is_key_minus_query() -> None:
    scheme = build("shaw", max_distance=1)
    with torch.no_grad():
        scheme.key_tables["0"].copy_(torch.tensor([-1.0, 0.0, 1.0])[:, None].expand(3, 64))
    ones = torch.ones(1, 12, 3, 64)
    # 64 ones times +-1, times 1/64
    bias = scheme.score_bias(ones, ones, positions(0, 3, 3), scaling=1 / 64, layer=0)[0, 0]
    assert bias.tolist() == [[0, 1, 1], [-1, 0, 1], [-1, -1, 0]]


def test_old_berts_relative_key_is_this_scheme_with_the_table_upside_down() -> None:
    length = 6
    scheme = build("shaw", max_distance=length - 1)
    old = torch.randn(2 * length - 1, 64)
    with torch.no_grad():
        scheme.key_tables["0"].copy_(old.flip(0))
    query = torch.randn(1, 12, length, 64)
    index = torch.arange(length)[:, None] - torch.arange(length)[None] + length - 1  # i - j + M - 1
    theirs = torch.einsum("bhld,lrd->bhlr", query, old[index]) / 8
    ours = scheme.score_bias(query, query, positions(0, length, length), scaling=1 / 8, layer=0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter_of_the_layer_and_start_is_zero() -> None:
    scheme = build("shaw", max_distance=2, variant="key_query", value=True)
    assert not any(parameter.any() for parameter in scheme.parameters())
    x = torch.randn(1, 12, 5, 64)
    for layer in range(3):
        bias = scheme.score_bias(x, x, positions(0, 5, 5), scaling=1.0, layer=layer)
        output = scheme.value_bias(bias.softmax(-1), positions(0, 5, 5), layer=layer)
        ((bias * torch.randn_like(bias)).sum() + output.sum()).backward()
    assert all(parameter.grad.ne(0).any(dim=1).all() for parameter in scheme.parameters())


def test_value_hook_only_where_asked() -> None:
    assert build("shaw").hooks == {"score_bias"}
    assert build("shaw", value=True).hooks == {"score_bias", "value_bias"}


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"shaw: option 'max_distance' is 0; it must be an integer from 1"):
        build("shaw", max_distance=0)
    with pytest.raises(OptionError, match=r"'max_distance' is 10000000000"):
        build("shaw", max_distance=10**10)
    with pytest.raises(OptionError, match=r"'variant' is 'keyquery'.*Did you mean 'key_query'"):
        build("shaw", variant="keyquery")
    with pytest.raises(OptionError, match=r"unknown option 'values'. Did you mean 'value'"):
        build("shaw", values=True)
