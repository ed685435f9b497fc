"""DeBERTa's two terms: pair by pair, and against transformers' DeBERTa-v2 with the same weights."""

import dataclasses
import math

import pytest
import torch
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, make_log_bucket_position

from pe_swap.errors import OptionError
from pe_swap.schemes import Scheme
from pe_swap.schemes.deberta import log_bucket
from tests.references import deberta as reference
from tests.support.schemes import build, geometry, positions

SMALL = geometry(hidden_size=24, num_heads=3, head_dim=8, is_causal=False)


def random_scheme(**options: object) -> Scheme:
    scheme = build("deberta", sizes=SMALL, **options)
    for parameter in scheme.parameters():
        torch.nn.init.normal_(parameter)
    return scheme


@pytest.mark.parametrize(("span", "max_distance"), [(256, 512), (8, 20), (7, 30), (2, 9)])
def test_every_distance_has_transformers_bucket(span: int, max_distance: int) -> None:
    distance = torch.arange(-3000, 3001)
    theirs = make_log_bucket_position(distance, span, max_distance).long()
    assert torch.equal(log_bucket(distance, span, max_distance), theirs)


@pytest.mark.parametrize("options", [{"span": 6, "max_distance": 12}, {"buckets": "clip", "span": 3}])
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 9, 9), (6, 3, 9), (8, 1, 9)])
def test_scores_are_the_papers(options: dict[str, object], first_query: int, q_len: int, kv_len: int) -> None:
    scheme = random_scheme(**options)
    query, key = torch.randn(2, 3, q_len, 8), torch.randn(2, 3, kv_len, 8)
    ours = scheme.score_bias(query, key, positions(first_query, q_len, kv_len), scaling=0.5, layer=1)
    table = scheme.table.detach().double()
    key_rows = (table @ scheme.key_weights["1"].detach().double().T).reshape(-1, 3, 8).transpose(0, 1)
    query_rows = table @ scheme.query_weights["1"].detach().double().T + scheme.query_biases["1"].detach().double()
    query_rows = query_rows.reshape(-1, 3, 8).transpose(0, 1)
    reach = scheme.options.max_distance if scheme.options.buckets == "log" else None
    expected = 0.5 * reference.score_term(query, key, key_rows, query_rows, first_query, scheme.options.span, reach)
    torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("options", [{"span": 6, "max_distance": 12}, {"buckets": "clip", "span": 3}, {"layer_norm": True}])
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 9, 9), (6, 3, 9), (8, 1, 9)])
def test_a_decoder_gets_what_an_encoder_does_for_keys_it_may_see(
    options: dict[str, object], first_query: int, q_len: int, kv_len: int
) -> None:
    encoder = random_scheme(**options)
    decoder = build("deberta", sizes=dataclasses.replace(SMALL, is_causal=True), **options)
    decoder.load_state_dict(encoder.state_dict())
    query, key, where = torch.randn(2, 3, q_len, 8), torch.randn(2, 3, kv_len, 8), positions(first_query, q_len, kv_len)
    expected, found = (scheme.score_bias(query, key, where, scaling=0.5, layer=1) for scheme in (encoder, decoder))
    seen = where.distance <= 0
    torch.testing.assert_close(found[:, :, seen], expected[:, :, seen], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("terms", "theirs"), [("both", ["c2p", "p2c"]), ("content_to_position", ["c2p"]), ("position_to_content", ["p2c"])]
)
@pytest.mark.parametrize("buckets", ["log", "clip"])
def test_probabilities_are_transformers_with_the_same_weights(terms: str, theirs: list[str], buckets: str) -> None:
    span, length = (8, 30) if buckets == "log" else (12, 30)
    config = DebertaV2Config(
        hidden_size=24,
        num_attention_heads=3,
        relative_attention=True,
        pos_att_type=theirs,
        position_buckets=span if buckets == "log" else -1,
        max_relative_positions=20 if buckets == "log" else span,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    module = DisentangledSelfAttention(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    scheme = random_scheme(buckets=buckets, span=span, max_distance=20, terms=terms, scale="paper")
    with torch.no_grad():
        if scheme.key_weights:
            scheme.key_weights["0"].copy_(module.pos_key_proj.weight)  # its bias is the same for every key: softmax removes it
        if scheme.query_weights:
            scheme.query_weights["0"].copy_(module.pos_query_proj.weight)
            scheme.query_biases["0"].copy_(module.pos_query_proj.bias)
    hidden = torch.randn(2, length, 24)
    mask = torch.ones(2, 1, length, length)
    with torch.no_grad():
        _, expected = module(hidden, mask, output_attentions=True, rel_embeddings=scheme.table)
        query = module.query_proj(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
        key = module.key_proj(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
        query = query * scheme.query_scale(torch.full((1, length), length), layer=0)[:, None, :, None]
        bias = scheme.score_bias(query, key, positions(0, length, length), scaling=8**-0.5, layer=0)
    ours = (query @ key.transpose(-1, -2) * 8**-0.5 + bias).softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_bias_is_transformers_with_the_same_weights() -> None:
    config = DebertaV2Config(
        hidden_size=24,
        num_attention_heads=3,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        max_relative_positions=20,
    )
    module = DisentangledSelfAttention(config).eval()
    scheme = random_scheme(span=8, max_distance=20)
    with torch.no_grad():
        scheme.key_weights["0"].copy_(module.pos_key_proj.weight)
        scheme.query_weights["0"].copy_(module.pos_query_proj.weight)
        scheme.query_biases["0"].copy_(module.pos_query_proj.bias)
        module.pos_key_proj.bias.zero_()
        query, key = torch.randn(2, 3, 30, 8), torch.randn(2, 3, 30, 8)
        theirs = module.disentangled_attention_bias(query.flatten(0, 1), key.flatten(0, 1), None, scheme.table, 3)
        ours = scheme.score_bias(query, key, positions(0, 30, 30), scaling=24**-0.5, layer=0)
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-4, rtol=0)


def test_scale_is_the_models_or_the_papers() -> None:
    assert build("deberta").hooks == {"score_bias"}
    assert build("deberta", scale="paper").hooks == {"score_bias", "query_scale"}
    seen = torch.tensor([[1, 5]])
    for terms, divisor in (("both", 3), ("content_to_position", 2)):
        scale = build("deberta", scale="paper", terms=terms).query_scale(seen, layer=0)
        torch.testing.assert_close(scale, torch.full((1, 2), 1 / math.sqrt(divisor)))


def test_layer_norm_is_of_the_table() -> None:
    scheme = random_scheme(layer_norm=True, terms="content_to_position")
    scheme.norm.reset_parameters()
    plain = random_scheme(terms="content_to_position")
    with torch.no_grad():
        plain.table.copy_(torch.nn.functional.layer_norm(scheme.table, (24,), eps=1e-7))
        plain.key_weights["0"].copy_(scheme.key_weights["0"])
    x = torch.randn(1, 3, 4, 8)
    ours, expected = (one.score_bias(x, x, positions(0, 4, 4), scaling=1.0, layer=0) for one in (scheme, plain))
    torch.testing.assert_close(ours, expected)


def test_start_is_zero_and_moves() -> None:
    scheme = build("deberta")
    x = torch.randn(1, 12, 5, 64)
    bias = scheme.score_bias(x, x, positions(0, 5, 5), scaling=1.0, layer=0)
    assert not bias.any()
    (bias * torch.randn_like(bias)).sum().backward()
    assert scheme.key_weights["0"].grad.any()
    assert scheme.query_weights["0"].grad.any()


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"deberta: option 'max_distance' is 129; it must be above span / 2 \+ 1 = 129"):
        build("deberta", max_distance=129)
    with pytest.raises(OptionError, match=r"'terms' is 'c2p'; it must be one of 'both', 'content_to_position'"):
        build("deberta", terms="c2p")
    with pytest.raises(OptionError, match=r"'span' is 1; it must be an integer from 2"):
        build("deberta", span=1)
    with pytest.raises(OptionError, match=r"'scale' is 'papers'.*Did you mean 'paper'"):
        build("deberta", scale="papers")
