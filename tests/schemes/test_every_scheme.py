"""What holds for every scheme: faster forms give the plain numbers; devices; shapes of parameters; resolved options."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from pe_swap.schemes import SCHEMES, Native, Scheme, build_options
from pe_swap.schemes.positions import Positions
from tests.support.schemes import at_positions, build, geometry, positions

FAST = [name for name in SCHEMES.names() if SCHEMES[name].__name__.startswith("Fast")]
OPTIONS = {
    "deberta": {"span": 6, "max_distance": 12},
    "xpos": {"scale_base": 3, "gamma": 0.1},
    "self_extend": {"window": 3, "group_size": 2},
    "rerope": {"window": 3},
}
FORMS = [(name, is_causal) for name in FAST for is_causal in (True, False) if is_causal or not SCHEMES[name].causal_only]
PREPARING = [name for name in SCHEMES.names() if SCHEMES[name].prepare is not Scheme.prepare]
FOLDING = [name for name in SCHEMES.names() if SCHEMES[name].fold_bias_into_query_key is not Scheme.fold_bias_into_query_key]


def random_scheme(name: str, is_causal: bool, dtype: torch.dtype = torch.float64, **options: object) -> Scheme:
    scheme = build(name, sizes=geometry(hidden_size=24, num_heads=3, head_dim=8, is_causal=is_causal), **options)
    for parameter in scheme.parameters():
        torch.nn.init.normal_(parameter)
    return scheme.to(dtype)


def plain(fast: Scheme) -> Scheme:
    """Return the scheme as its paper writes it, with the same numbers: the first class above the fast one that is not fast."""
    plain_class = next(base for base in type(fast).__mro__ if not base.__name__.startswith("Fast"))
    scheme = plain_class(fast.options, fast.geometry, fast.layers).to(torch.float64)
    scheme.load_state_dict(fast.state_dict())
    return scheme


def call_of(scheme: Scheme, first_query: int, q_len: int, kv_len: int) -> Positions:
    call = positions(first_query, q_len, kv_len)
    if "extra_key_channels" in scheme.hooks:
        return replace(call, carried=scheme.extra_key_channels(torch.randn(2, kv_len, 24).to(torch.float64), layer=1))
    return call


def test_every_scheme_with_a_faster_form_is_among_them() -> None:
    assert set(PREPARING) | set(FOLDING) <= set(FAST)
    assert {"deberta", "fire", "fox", "rerope", "self_extend", "transformer_xl", "xpos"} <= set(FAST)


@pytest.mark.parametrize(("name", "is_causal"), FORMS)
@pytest.mark.parametrize("options", [True, False], ids=["options", "defaults"])
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 9, 9), (4, 5, 9), (4, 5, 12), (8, 1, 9), (8, 1, 12)])
def test_a_faster_form_gives_the_plain_forms_numbers(
    name: str, is_causal: bool, options: bool, first_query: int, q_len: int, kv_len: int
) -> None:
    fast = random_scheme(name, is_causal, **(OPTIONS.get(name, {}) if options else {}))
    query, key = torch.randn(2, 3, q_len, 8, dtype=torch.float64), torch.randn(2, 3, kv_len, 8, dtype=torch.float64)
    call = call_of(fast, first_query, q_len, kv_len)
    expected = plain(fast).score_bias(query, key, call, scaling=0.5, layer=1)
    seen = call.distance <= (0 if is_causal else kv_len)
    prepared = replace(call, prepared=fast.prepare(call, layer=1))
    for where in (call, prepared):
        found = fast.score_bias(query, key, where, scaling=0.5, layer=1)
        torch.testing.assert_close(found[..., seen], expected.expand(found.shape)[..., seen], atol=2e-5, rtol=1e-5)
    folded = fast.fold_bias_into_query_key(query, key, prepared, scaling=0.5, layer=1)
    if folded is not None:
        rest = 0 if folded[2] is None else folded[2]
        scores = 0.5 * folded[0] @ folded[1].transpose(-1, -2) + rest
        wanted = 0.5 * query @ key.transpose(-1, -2) + expected
        torch.testing.assert_close(scores[..., seen], wanted[..., seen], atol=2e-5, rtol=1e-5)
    assert expected.abs().max() > 1e-3 or name in ("rerope", "self_extend")  # within the default window there is no bias


@pytest.mark.parametrize("name", FOLDING)
def test_a_single_query_needs_no_bias_or_a_part_of_it(name: str) -> None:
    fast = random_scheme(name, True, **OPTIONS.get(name, {}))
    query, key = torch.randn(2, 3, 1, 8, dtype=torch.float64), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    folded = fast.fold_bias_into_query_key(query, key, call_of(fast, 8, 1, 9), scaling=0.5, layer=1)
    assert folded is not None
    assert not (folded[0].equal(query) and folded[1].equal(key))


@pytest.mark.parametrize(("name", "is_causal"), [case for case in FORMS if case[0] in PREPARING])
@pytest.mark.parametrize(("first_query", "q_len", "kv_len"), [(0, 9, 9), (4, 5, 9), (4, 5, 12)])
def test_a_blocks_scores_are_those_of_the_whole(name: str, is_causal: bool, first_query: int, q_len: int, kv_len: int) -> None:
    scheme = random_scheme(name, is_causal)
    query, key = torch.randn(2, 3, q_len, 8).double(), torch.randn(2, 3, kv_len, 8).double()
    call = call_of(scheme, first_query, q_len, kv_len)
    prepared = replace(call, prepared=scheme.prepare(call, layer=1))
    whole = scheme.score_bias(query, key, call, scaling=0.5, layer=1)
    assert whole.abs().max() > 0.1
    for start, stop, kv_stop in ((0, 2, kv_len), (2, 5, kv_len), (2, 5, first_query + 5)):
        block = prepared.block(start, stop, kv_stop)
        part = scheme.score_bias(query[:, :, start:stop], key[:, :, :kv_stop], block, scaling=0.5, layer=1)
        seen = block.distance <= (0 if is_causal else kv_len)
        torch.testing.assert_close(part[..., seen], whole[:, :, start:stop, :kv_stop][..., seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "is_causal"), [(name, c) for name in SCHEMES.names() for c in (True, False) if c or not SCHEMES[name].causal_only]
)
def test_a_scheme_computes_where_its_input_is_whatever_the_default_device(name: str, is_causal: bool) -> None:
    """On another default device, what a scheme builds itself must stand beside its input: here that device holds no numbers at all."""
    options = {"scale": 1.0} if name in ("index", "binary", "sinusoidal") else OPTIONS.get(name, {})
    scheme = random_scheme(name, is_causal, torch.float32, **options)
    query, key, tokens, ids = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 9, 24), torch.arange(9)[None]
    where, distance, seen = positions(4, 5, 9), torch.arange(-9, 1), torch.arange(1, 90)[None]

    def results() -> list[torch.Tensor]:
        call, found = where, []
        if "extra_key_channels" in scheme.hooks:
            found.append(scheme.extra_key_channels(tokens, layer=1))
            call = replace(where, carried=found[0])
        if "encode" in scheme.hooks:
            found.append(scheme.encode(ids))
        if "embed" in scheme.hooks:
            found.append(scheme.embed(tokens, ids))
        if "transform_query_key" in scheme.hooks:
            found.append(at_positions(scheme, key, ids, role="key", layer=1))
        if "relative_bias" in scheme.hooks:
            found.append(scheme.relative_bias(distance, layer=1))
        if "score_bias" in scheme.hooks:
            found.append(scheme.score_bias(query, key, call, scaling=0.5, layer=1))
            folded = scheme.fold_bias_into_query_key(query[:, :, :1], key, call.block(0, 1), scaling=0.5, layer=1)
            found += [part for part in folded or () if part is not None]
        found.append(scheme.query_scale(seen, layer=1))
        return found

    expected = results()
    with torch.device("meta"):
        found = results()
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.device.type == "cpu"
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", SCHEMES.names())
def test_options_resolve_against_the_models_own_table_whatever_the_default_device(name: str) -> None:
    table = torch.randn(32, 768)
    expected = build(name, table)
    with torch.device("meta"):
        options = type(expected).Options().resolve(geometry(), Native(table=table))
    assert options == expected.options


@pytest.mark.parametrize("name", SCHEMES.names())
def test_no_parameter_is_a_bare_number(name: str) -> None:
    """Sharding (FSDP2, ZeRO-3) refuses parameters without a dimension."""
    scheme = build(name, torch.randn(32, 768))
    assert all(parameter.dim() for parameter in scheme.parameters())


@pytest.mark.parametrize("name", SCHEMES.names())
def test_resolved_options_are_plain_values_and_resolve_to_themselves(name: str) -> None:
    given = SCHEMES[name].Options()
    resolved = given.resolve(geometry(), Native(table=torch.randn(32, 768)))
    left_open = {
        option.name
        for option in dataclasses.fields(given)
        if "native_or" in option.metadata or getattr(given, option.name) == "match"
    }
    assert not [option for option in left_open if getattr(resolved, option) in (None, "match")]
    assert (type(resolved) is not type(given)) >= bool(left_open)
    elsewhere = geometry(trained_length=99, is_causal=False, input_size=11)
    assert resolved.resolve(elsewhere, Native()) == resolved
    assert build_options(SCHEMES[name].Options, resolved.to_dict()).resolve(elsewhere, Native()) == resolved
