"""Scaled rotary frequencies against the papers, the golden table, and transformers' Llama."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pe_swap.errors import OptionError
from pe_swap.schemes import SCHEMES, Native, build_options
from pe_swap.schemes.rope import REQUIRED, Rope, RopeOptions, sequence_lengths
from tests.references import rope as plain_reference
from tests.references import rope_scaling as reference
from tests.support.schemes import at_positions, build, geometry

LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = [1.0 + 0.05 * k for k in range(32)]
LONG = [1.5 + 0.25 * k for k in range(32)]
LONGROPE = {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG}
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "proportional": {"fraction": 0.5},
}


def rope(rope_type: str, trained_length: int = 1024, **options: Any) -> Rope:
    scheme = build("rope", sizes=geometry(trained_length=trained_length), rope_type=rope_type, **options)
    assert isinstance(scheme, Rope)
    return scheme


def frequencies(scheme: Rope, length: int) -> torch.Tensor:
    found = scheme.inv_freq(torch.arange(length)[None])
    return found.expand(1, 1, length, found.shape[-1])[0, 0, 0]


def test_every_rope_type_is_tested() -> None:
    assert set(SCALED) == set(REQUIRED)
    assert set(ROPE_INIT_FUNCTIONS) <= set(REQUIRED)


@pytest.mark.parametrize(
    ("rope_type", "options", "length", "attention_factor", "golden"),
    [
        ("default", {}, 8, 1, [1, 0.7498942, 0.1, 0.01, 0.001, 1.333522e-4]),
        ("linear", {"factor": 4.0}, 8, 1, [0.25, 0.1874736, 0.025, 0.0025, 2.5e-4, 3.333804e-5]),
        ("dynamic", {"factor": 4.0}, 4096, 1, [1, 0.6903452, 0.05158587, 2.661102e-3, 1.372752e-4, 1.025786e-5]),
        ("yarn", {"factor": 4.0}, 8, 1.138629, [1, 0.7498942, 0.08269231, 3.653846e-3, 2.5e-4, 3.333804e-5]),
        ("llama3", LLAMA3, 8, 1, [1, 0.7498942, 0.1, 4.074366e-3, 2.5e-4, 3.333804e-5]),
        ("proportional", {"fraction": 0.5}, 8, 1, [1, 0.7498942, 0.1, 0, 0, 0]),
        (
            "longrope",
            {"factor": 4.0, "short_factor": [1.0] * 32, "long_factor": LONG},
            8,
            1.095445,
            [1, 0.7498942, 0.1, 0.01, 0.001, 1.333522e-4],
        ),
    ],
)
def test_golden_frequencies(
    rope_type: str, options: dict[str, Any], length: int, attention_factor: float, golden: list[float]
) -> None:
    scheme = rope(rope_type, **options)
    assert scheme.attention_factor == pytest.approx(attention_factor, rel=1e-6)
    found = frequencies(scheme, length)[[0, 1, 8, 16, 24, 31]]
    torch.testing.assert_close(found, torch.tensor(golden, dtype=torch.float32), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("rope_type", "options", "length", "expected"),
    [
        ("linear", {"factor": 3.0, "fraction": 0.5, "base": 500.0}, 5, reference.linear(32, 500.0, 3.0)),
        ("ntk", {"factor": 3.0, "fraction": 0.5}, 5, reference.ntk(32, 1e4, 3.0)),
        ("dynamic", {"factor": 2.0, "original_max_position_embeddings": 100}, 77, reference.default(64, 1e4)),
        ("dynamic", {"factor": 2.0, "original_max_position_embeddings": 100}, 333, reference.dynamic(64, 1e4, 2.0, 100, 333)),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 300}, 5, reference.yarn(64, 1e4, 8.0, 300)),
        (
            "yarn",
            {"factor": 8.0, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
            5,
            reference.yarn(64, 1e4, 8.0, 1024, 20.0, 2.0, False),
        ),
        ("llama3", {**LLAMA3, "original_max_position_embeddings": 200}, 5, reference.llama3(64, 1e4, 4.0, 200, 1.0, 4.0)),
        ("longrope", LONGROPE, 1024, reference.longrope(64, 1e4, SHORT)),
        ("longrope", LONGROPE, 1025, reference.longrope(64, 1e4, LONG)),
        ("proportional", {"fraction": 0.25, "factor": 2.0}, 5, reference.proportional(64, 1e4, 0.25, 2.0)),
    ],
)
def test_is_the_papers(rope_type: str, options: dict[str, Any], length: int, expected: list[float]) -> None:
    found = frequencies(rope(rope_type, **options), length)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


def test_attention_factors() -> None:
    assert rope("yarn", factor=8.0).attention_factor == pytest.approx(reference.yarn_attention_factor(8.0))
    deepseek = rope("yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.707)
    assert deepseek.attention_factor == pytest.approx(reference.yarn_attention_factor(40.0, 1.0, 0.707))
    assert rope("yarn", factor=8.0, attention_factor=1.5).attention_factor == 1.5
    assert rope("longrope", **LONGROPE).attention_factor == pytest.approx(reference.longrope_attention_factor(4.0, 1024))
    divisors = {"short_factor": SHORT, "long_factor": LONG}
    assert rope("longrope", attention_factor=1.25, **divisors).attention_factor == 1.25


@pytest.mark.parametrize("rope_type", ["yarn", "longrope", "dynamic"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_vectors_are_turned_by_these_frequencies_and_stretched(rope_type: str, layout: str) -> None:
    scheme = rope(rope_type, trained_length=16, layout=layout, **SCALED[rope_type])
    x, ids = torch.randn(1, 2, 40, 64), torch.arange(40)[None]
    found = at_positions(scheme, x, ids, role="key", layer=0)
    inv_freq = frequencies(scheme, 40).double()
    for place in (0, 7, 39):
        turned = plain_reference.rotated_by(x[0, 1, place], [place * float(theta) for theta in inv_freq], layout)
        torch.testing.assert_close(found[0, 1, place].double(), turned * scheme.attention_factor, atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [50, 200])
@pytest.mark.parametrize(
    "rope_type", [rope_type for rope_type in SCALED if rope_type == "default" or rope_type in ROPE_INIT_FUNCTIONS]
)
def test_queries_and_keys_are_llamas(rope_type: str, length: int) -> None:
    options = {**SCALED[rope_type]}
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **options}
    if "fraction" in parameters:
        parameters["partial_rotary_factor"] = parameters.pop("fraction")
    if rope_type in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = 64
    config = LlamaConfig(hidden_size=768, num_attention_heads=12, max_position_embeddings=64, rope_parameters=parameters)
    query, key = torch.randn(2, 12, length, 64), torch.randn(2, 12, length, 64)
    ids = torch.arange(length).expand(2, -1)
    cosine, sine = LlamaRotaryEmbedding(config)(query, ids)
    scheme = rope(rope_type, trained_length=64, **options)
    theirs = apply_rotary_pos_emb(query, key, cosine, sine)
    ours = (at_positions(scheme, query, ids, role="query", layer=0), at_positions(scheme, key, ids, role="key", layer=0))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_sequence_ends_where_its_ids_stop_rising() -> None:
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 2], [0, 1, 2, 0, 1, 2], [0, 9, 30, 1, 5, 6]])
    found = sequence_lengths(ids)
    assert found.tolist() == [[6] * 6, [1, 1, 4, 4, 4, 4], [3] * 6, [3] * 6, [31, 31, 31, 7, 7, 7]]
    assert sequence_lengths(torch.tensor([[40], [3]])).tolist() == [[41], [4]]


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_row_does_not_depend_on_its_neighbours(rope_type: str) -> None:
    scheme = rope(rope_type, trained_length=8, **SCALED[rope_type])
    x, ids = torch.randn(2, 12, 20, 64), torch.stack((torch.arange(20), torch.arange(20) % 5))
    together = at_positions(scheme, x, ids, role="query", layer=0)
    for row in range(2):
        torch.testing.assert_close(
            together[row : row + 1], at_positions(scheme, x[row : row + 1], ids[row : row + 1], role="query", layer=0)
        )
    fixed = at_positions(build("rope"), x, ids, role="query", layer=0)
    if rope_type == "dynamic":  # the second row is shorter than the original length, the first longer
        torch.testing.assert_close(together[1], fixed[1], atol=1e-5, rtol=0)
    assert (together[0] - fixed[0]).abs().max() > 0.1


def test_claims_follow_the_options() -> None:
    for rope_type, options in SCALED.items():
        scheme = rope(rope_type, **options)
        fixed = rope_type not in ("dynamic", "longrope")
        assert (scheme.shift_invariant, scheme.caches_rotated_keys, scheme.cached_equals_uncached) == (fixed, fixed, fixed)


@pytest.mark.parametrize("rope_type", SCALED)
def test_a_compiled_graph_stays_whole_and_survives_another_device_in_context(rope_type: str) -> None:
    with torch.device("meta"):  # as a model is built whose weights are yet to be loaded
        scheme = rope(rope_type, trained_length=16, **SCALED[rope_type])
    x, ids = torch.randn(1, 2, 24, 64), torch.arange(24)[None]
    compiled = torch.compile(at_positions, fullgraph=True, backend="eager")
    expected = at_positions(rope(rope_type, trained_length=16, **SCALED[rope_type]), x, ids, role="key", layer=0)
    torch.testing.assert_close(compiled(scheme, x, ids, role="key", layer=0), expected)


def test_options_survive_json() -> None:
    for rope_type, options in SCALED.items():
        resolved = rope(rope_type, **options).options
        assert isinstance(resolved, RopeOptions)
        saved = json.loads(json.dumps(resolved.to_dict()))
        assert build_options(RopeOptions, saved).resolve(geometry(trained_length=5), Native()) == resolved
        assert None not in saved.values()
    assert rope("yarn", trained_length=77, factor=2.0).options.to_dict()["original_max_position_embeddings"] == 77


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_type": "yarm"}, r"rope: option 'rope_type' is 'yarm'; it must be one of .* Did you mean 'yarn'"),
        ({"rope_type": "linear"}, r"rope: rope_type 'linear' needs the option 'factor', and it is not given\. Give it"),
        (
            {"factor": 2.0},
            r"option 'factor' is 2.0, but rope_type 'default' does not read it; it reads none of the scaling options",
        ),
        (
            {"rope_type": "ntk", "factor": 2.0, "beta_fast": 3.0},
            r"'beta_fast' is 3.0, but rope_type 'ntk' does not read it; it reads factor",
        ),
        ({"rope_type": "yarn", "factor": 0.5}, r"'factor' is 0.5; it must be at least 1"),
        ({"rope_type": "yarn", "factor": "4"}, r"'factor' is '4'; it must be a number above 0"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, r"'truncate' is 1; it must be True or False"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 40.0}, r"'beta_fast' is None; it must be above beta_slow = 40.0"),
        (
            {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0},
            r"'high_freq_factor' is 1.0; it must be above low_freq_factor",
        ),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1}, r"it must be an integer from 2 to"),
        (
            {"rope_type": "dynamic", "factor": 2.0, "fraction": 1 / 32},
            r"'dynamic' with 2 rotary dimensions; it must have at least 4",
        ),
        (
            {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
            r"'longrope' needs the option 'factor', or 'attention",
        ),
        (
            {"rope_type": "longrope", **LONGROPE, "long_factor": [1.0]},
            r"'long_factor' has 1 numbers; it must have 32, one for each plane",
        ),
        (
            {"rope_type": "longrope", **LONGROPE, "short_factor": [0.0] * 32},
            r"must be a list of numbers from 1e-06 to 1e\+12, one for each plane",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build("rope", **options)


def test_a_fraction_that_floating_point_rounds_down_turns_all_its_planes() -> None:
    """0.58 of 100 dimensions is 57.99999999999999."""
    scheme = build("rope", sizes=geometry(head_dim=100), rope_type="proportional", fraction=0.58)
    assert isinstance(scheme, Rope)
    found = frequencies(scheme, 3)
    assert (found > 0).sum() == 29
    expected = torch.tensor(reference.proportional(100, 1e4, 0.58, 1.0), dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


def test_options_that_would_be_read_together_or_not_at_all() -> None:
    with pytest.raises(
        OptionError, match=r"rope: option 'mscale' is 0\.7 and 'mscale_all_dim' is not given, .* Give both, or neither\."
    ):
        rope("yarn", factor=4.0, mscale=0.7)
    with pytest.raises(OptionError, match=r"rope: option 'mscale_all_dim' is 1\.0 and 'mscale' is not given"):
        rope("yarn", factor=4.0, mscale_all_dim=1.0)
    assert rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.0).attention_factor != rope("yarn", factor=4.0).attention_factor


def test_options_of_which_one_would_hide_the_other() -> None:
    rule = r"rope_type '{}' reads '{}' only to work out 'attention_factor'\. Leave one of them out\."
    with pytest.raises(
        OptionError, match=r"'factor' = 4\.0 and 'attention_factor' = 1\.25.* " + rule.format("longrope", "factor")
    ):
        rope("longrope", **LONGROPE, attention_factor=1.25)
    with pytest.raises(OptionError, match=r"'mscale' = 1\.0 and 'attention_factor' = 1\.25.* " + rule.format("yarn", "mscale")):
        rope("yarn", factor=4.0, attention_factor=1.25, mscale=1.0, mscale_all_dim=0.7)
    assert rope("yarn", factor=4.0, attention_factor=1.25).attention_factor == 1.25  # factor divides the frequencies, too


@pytest.mark.parametrize(
    ("theirs", "ours", "value"),
    [("rope_theta", "base", 500.0), ("partial_rotary_factor", "fraction", 0.5), ("type", "rope_type", "ntk")],
)
def test_names_of_transformers_are_taken_as_ours(theirs: str, ours: str, value: object) -> None:
    scaling = {"factor": 2.0} if ours == "rope_type" else {}
    assert build("rope", **{theirs: value}, **scaling).options == build("rope", **{ours: value}, **scaling).options
    with pytest.raises(OptionError, match=rf"rope: options '{ours}' and '{theirs}' are both given, and they are one option\."):
        build("rope", **{theirs: value, ours: value}, **scaling)
    with pytest.raises(OptionError, match=rf"alibi: unknown option '{theirs}'\. Options: slopes"):
        build("alibi", **{theirs: value})


@pytest.mark.parametrize("rope_type", SCALED)
def test_a_models_rope_parameters_are_taken_as_they_are(rope_type: str) -> None:
    if rope_type == "ntk":
        parameters = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    else:
        config = LlamaConfig(
            hidden_size=768,
            num_attention_heads=12,
            max_position_embeddings=64,
            rope_parameters={"rope_type": rope_type, "rope_theta": 500.0, **SCALED[rope_type]},
        )
        parameters = dict(config.rope_parameters)
    given = build("rope", **parameters).options
    assert given.base == 500.0
    assert given.rope_type == parameters["rope_type"]


def test_what_others_call_an_option_is_answered_with_its_name() -> None:
    for scheme in ("rope", "hope", "xpos", "self_extend", "rerope", "sinusoidal"):
        with pytest.raises(OptionError, match=rf"^{scheme}: unknown option 'theta'\. Did you mean 'base'\?$"):
            build_options(SCHEMES[scheme].Options, {"theta": 1e4})


YARN = {"base": 500.0, "fraction": 0.5, "layout": "interleaved", "rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}


def test_what_is_left_out_is_the_models_own() -> None:
    native = Native(options=YARN)
    own = build("rope", native=native)
    assert own.options.to_dict() == {**YARN, "original_max_position_embeddings": 32}
    assert own.keeps_function
    longer = build("rope", native=native, factor=4.0)
    assert longer.options.to_dict() == {**own.options.to_dict(), "factor": 4.0}
    assert not longer.keeps_function
    afresh = build("rope", native=native, rope_type="linear", factor=4.0)
    assert afresh.options.to_dict() == {
        "base": 500.0,
        "fraction": 0.5,
        "layout": "interleaved",
        "rope_type": "linear",
        "factor": 4.0,
    }
    assert not build("rope").keeps_function
    for resolved in (own.options, longer.options, afresh.options):
        again = build_options(RopeOptions, resolved.to_dict())
        assert again.resolve(geometry(trained_length=7), native) == resolved
        assert resolved.resolve(geometry(trained_length=7), Native()) == resolved


@pytest.mark.parametrize("name", ["hope", "xpos", "self_extend", "rerope"])
def test_other_rotations_follow_the_models_base_and_layout(name: str) -> None:
    options = build(name, native=Native(options=YARN)).options
    assert (options.base, options.layout) == (500.0, "interleaved")
    assert getattr(options, "fraction", 0.5) == 0.5
    assert build(name, native=Native(options=YARN), base=77.0).options.base == 77.0


@pytest.mark.parametrize("divisor", [1e-50, 0.0, -1.0, float("nan"), float("inf"), 10**400, True, "2"])
def test_a_divisor_that_leaves_no_frequency_is_refused(divisor: object) -> None:
    with pytest.raises(
        OptionError, match=r"rope: option 'short_factor' is .*; it must be a list of numbers from 1e-06 to 1e\+12"
    ):
        rope("longrope", **{**LONGROPE, "short_factor": [divisor, *SHORT[1:]]})
