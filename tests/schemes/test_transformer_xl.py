"""Transformer-XL's relative positions, pair by pair."""

from dataclasses import replace

import pytest
import torch

from pe_swap.errors import OptionError
from pe_swap.schemes import Scheme
from tests.references import transformer_xl as reference
from tests.support.schemes import build, geometry, positions

SMALL = geometry(hidden_size=24, num_heads=3, head_dim=8)


def random_scheme(is_causal: bool = True, **options: object) -> Scheme:
    scheme = build("transformer_xl", sizes=replace(SMALL, is_causal=is_causal), **options)
    for parameter in scheme.parameters():
        torch.nn.init.normal_(parameter)
    return scheme


@pytest.mark.parametrize("biases", ["shared", "per_layer"])
@pytest.mark.parametrize("max_distance", [None, 3])
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 7, 7), (5, 3, 8), (5, 2, 12), (7, 1, 8)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_scores_are_the_papers(
    biases: str, max_distance: int | None, first_query: int, q_len: int, kv_len: int, is_causal: bool
) -> None:
    scheme = random_scheme(is_causal, biases=biases, max_distance=max_distance)
    query, key = torch.randn(2, 3, q_len, 8), torch.randn(2, 3, kv_len, 8)
    ours = scheme.score_bias(query, key, positions(first_query, q_len, kv_len), scaling=0.25, layer=1)
    name = "shared" if biases == "shared" else "1"
    weight, u, v = scheme.distance_weights["1"], scheme.content_biases[name], scheme.distance_biases[name]
    expected = reference.score_term(query, key, weight.detach(), u.detach(), v.detach(), first_query, 0.25, max_distance)
    seen = positions(first_query, q_len, kv_len).distance <= (0 if is_causal else kv_len)
    torch.testing.assert_close(ours.double()[..., seen], expected[..., seen], atol=3e-5, rtol=0)


def test_distance_is_query_minus_key() -> None:
    scheme = random_scheme()
    vectors = scheme.distance_vectors(torch.tensor([-2, 2]))
    torch.testing.assert_close(vectors[0].double(), reference.sinusoid(2, 24), atol=1e-6, rtol=0)
    assert (vectors[0] - vectors[1]).abs().max() > 0.1  # sines tell the sides apart


def test_far_distances_are_exact_in_bf16() -> None:
    scheme = random_scheme().bfloat16()
    far = scheme.distance_vectors(torch.tensor([-4001]))[0]
    assert far.dtype == torch.bfloat16
    torch.testing.assert_close(far.double(), reference.sinusoid(4001, 24), rtol=2**-8, atol=1e-6)


def test_start_is_zero_and_the_first_gradient_reaches_what_moves_first() -> None:
    scheme = build("transformer_xl", sizes=SMALL)
    query, key = torch.randn(1, 3, 5, 8), torch.randn(1, 3, 5, 8)
    bias = scheme.score_bias(query, key, positions(0, 5, 5), scaling=1.0, layer=2)
    assert not bias.any()
    (bias * torch.randn_like(bias)).sum().backward()
    assert scheme.distance_weights["2"].grad.any()
    assert scheme.content_biases["shared"].grad.any()


def test_biases_shared_or_of_each_layer() -> None:
    assert set(build("transformer_xl").content_biases) == {"shared"}
    assert set(build("transformer_xl", biases="per_layer").distance_biases) == {"0", "1", "2"}


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"transformer_xl: option 'biases' is 'share'.*Did you mean 'shared'"):
        build("transformer_xl", biases="share")
    with pytest.raises(OptionError, match=r"'max_distance' is 0; it must be an integer from 1 to .*or None \(no limit\)"):
        build("transformer_xl", max_distance=0)
