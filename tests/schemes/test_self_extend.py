"""Self-Extend and ReRoPE: scores at remapped distances, pair by pair."""

import pytest
import torch

from pe_swap.attention.call import key_ids
from pe_swap.errors import OptionError
from pe_swap.schemes.positions import Positions
from tests.references import windowed_rope as reference
from tests.support.schemes import at_positions, build, geometry, positions

SMALL = geometry(hidden_size=24, num_heads=3, head_dim=8)
CASES = [("self_extend", {"window": 5, "group_size": 3}, 3), ("self_extend", {"window": 4, "group_size": 8}, 8)]
CASES += [("rerope", {"window": 5}, None), ("rerope", {"window": 1}, None)]


@pytest.mark.parametrize(("name", "options", "group_size"), CASES)
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 19, 19), (16, 3, 19), (18, 1, 19)])
def test_scores_are_the_papers(
    name: str, options: dict[str, int], group_size: int | None, first_query: int, q_len: int, kv_len: int
) -> None:
    scheme = build(name, sizes=SMALL, **options)
    query, key = torch.randn(2, 3, q_len, 8), torch.randn(2, 3, kv_len, 8)
    here = positions(first_query, q_len, kv_len)
    turned_query = at_positions(scheme, query, here.query_ids, role="query", layer=0)
    turned_key = at_positions(scheme, key, here.key_slots[None], role="key", layer=0)
    bias = scheme.score_bias(turned_query, turned_key, here, scaling=0.5, layer=0)
    ours = (turned_query @ turned_key.transpose(-1, -2) * 0.5 + bias).tril(first_query)
    expected = reference.scores(query, key, first_query, options["window"], group_size, 0.5)
    torch.testing.assert_close(ours.double(), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", ["self_extend", "rerope"])
def test_within_the_window_it_is_rope_exactly(name: str) -> None:
    scheme, rope = build(name, window=6, layout="interleaved", base=500), build("rope", layout="interleaved", base=500)
    x, ids = torch.randn(1, 12, 9, 64), torch.arange(9)[None]
    assert torch.equal(at_positions(scheme, x, ids, role="key", layer=0), at_positions(rope, x, ids, role="key", layer=0))
    bias = scheme.score_bias(x, x, positions(0, 9, 9), scaling=1.0, layer=0)
    distance = positions(0, 9, 9).distance
    assert not bias[..., distance > -6].any()
    assert bias[..., distance <= -7].abs().max() > 0.1
    assert not scheme.score_bias(x[:, :, :6], x[:, :, :6], positions(0, 6, 6), scaling=1.0, layer=0).any()


def test_groups_of_one_are_rope() -> None:
    scheme = build("self_extend", window=3, group_size=1)
    x = torch.randn(1, 12, 9, 64)
    bias = scheme.score_bias(x, x, positions(0, 9, 9), scaling=1.0, layer=0)
    torch.testing.assert_close(bias, torch.zeros_like(bias), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "options"), [case[:2] for case in CASES])
@pytest.mark.parametrize("tail", [0, 4])
def test_beside_one_query_turned_keys_say_what_the_bias_says(name: str, options: dict[str, int], tail: int) -> None:
    scheme = build(name, sizes=SMALL, **options).double()
    query_slots, key_slots = torch.tensor([18]), torch.arange(19 + tail)  # a static cache has an empty tail
    query_ids = torch.tensor([[18], [11]])
    here = Positions(query_slots, key_slots, query_ids, key_ids(query_slots, key_slots, query_ids))
    query, key = torch.randn(2, 3, 1, 8, dtype=torch.float64), torch.randn(2, 3, 19 + tail, 8, dtype=torch.float64)
    expected = query @ key.transpose(-1, -2) + scheme.score_bias(query, key, here, scaling=1.0, layer=0)
    pair = scheme.fold_bias_into_query_key(query, key, here, scaling=1.0, layer=0)
    assert pair is not None
    found = pair[0] @ pair[1].transpose(-1, -2)
    torch.testing.assert_close(found[..., :19], expected[..., :19], atol=2e-6, rtol=1e-6)  # angles are float32
    assert (expected - query @ key.transpose(-1, -2)).abs().max() > 0.1


@pytest.mark.parametrize(("name", "options"), [case[:2] for case in CASES])
def test_queries_and_keys_stay_as_they_are_where_no_pair_is_distant(name: str, options: dict[str, int]) -> None:
    scheme, window = build(name, sizes=SMALL, **options), options["window"]
    query, key = torch.randn(1, 3, window, 8), torch.randn(1, 3, window, 8)
    pair = scheme.fold_bias_into_query_key(query, key, positions(0, window, window), scaling=1.0, layer=0)
    assert pair is not None
    assert pair[0] is query
    assert pair[1] is key
    assert (
        scheme.fold_bias_into_query_key(
            query.repeat(1, 1, 2, 1), key.repeat(1, 1, 2, 1), positions(0, 2 * window, 2 * window), scaling=1.0, layer=0
        )
        is None
    )


def test_keys_ids_are_counted_back_from_a_real_token_under_padding_on_either_side() -> None:
    queries = torch.tensor([[0, 0, 1, 2], [3, 4, 4, 4], [7, 8, 9, 10]])
    found = key_ids(torch.arange(2, 6), torch.arange(6), queries)
    assert found.tolist() == [[-3, -2, -1, 0, 1, 2], [1, 2, 3, 4, 4, 4], [5, 6, 7, 8, 9, 10]]


def test_far_positions_keep_their_angles_in_bf16() -> None:
    scheme = build("rerope", sizes=SMALL, window=4)
    x = torch.ones(1, 3, 4000, 8).bfloat16()
    ids = torch.arange(4000)[None]
    turned = at_positions(scheme, x, ids, role="key", layer=0)
    bias = scheme.score_bias(turned[:, :, -1:], turned, positions(3999, 1, 4000), scaling=1.0, layer=0)
    total = (turned[:, :, -1:].float() @ turned.float().transpose(-1, -2) + bias)[0, 0, 0, :3990]
    expected = 2 * sum(torch.cos(torch.tensor(4.0) * 10_000 ** (-2 * k / 8)) for k in range(4))
    torch.testing.assert_close(total, expected.expand(3990), atol=0.05, rtol=0)  # 8 products of vectors of 8 bits


def test_default_window_is_half_the_trained_length() -> None:
    assert build("rerope").window == 16
    assert build("self_extend").options.to_dict()["window"] == 16


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"rerope: option 'window' is 0; it must be an integer from 1"):
        build("rerope", window=0)
    with pytest.raises(OptionError, match=r"rerope: option 'window' is 'half'; it must be an integer .*or 'match'"):
        build("rerope", window="half")
    with pytest.raises(OptionError, match=r"self_extend: option 'group_size' is 2.5; it must be an integer from 1"):
        build("self_extend", group_size=2.5)
    with pytest.raises(OptionError, match=r"self_extend: option 'layout' is 'neox'"):
        build("self_extend", layout="neox")
