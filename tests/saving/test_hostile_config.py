"""A `config.json` that somebody else wrote: read rightly or refused, and nothing allocated by what it claims."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from pe_swap.assignment import Assignment, from_saved
from pe_swap.errors import CheckpointError, OptionError, PESwapError
from pe_swap.families import FAMILIES
from pe_swap.saving.class_names import swapped_config_class
from pe_swap.schemes import SCHEMES, Geometry, Native, build_options
from tests.support.models import CASES, swapped

pytestmark = pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")

LAYERS = 2

GEOMETRY = Geometry(hidden_size=96, num_heads=12, head_dim=8, num_layers=LAYERS, is_causal=True, trained_length=32)

MOST_NUMBERS = 2**24 * 96
"""Numbers in the largest table that any options may ask of this geometry: the longest length, one row a position."""

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-3, max_value=70_000),
    st.sampled_from([10**12, 10**400, 2**24, 2**24 + 1, 65536, 65537, 1e308, -0.0, 5e-324]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(sorted({name for name, _ in CASES.values()} | {"match", "half", "press", "key", "learned", "__class__", ""})),
)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def option_values(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return dictionaries that name real options of a scheme, most of them, with any values."""
    options_class = SCHEMES[name].Options
    known = sorted(vars(options_class()))
    words = [value for case, options in CASES.values() if case == name for value in options.values()]
    values = st.one_of(anything, st.sampled_from([*words, *vars(options_class()).values()]))
    return st.dictionaries(st.one_of(st.sampled_from(known), st.sampled_from(known), st.text(max_size=8)), values, max_size=5)


schemes = st.sampled_from(SCHEMES.names())
entries = schemes.flatmap(lambda name: st.fixed_dictionaries({"name": st.just(name), "options": option_values(name)}))


def valid(case: str) -> dict[str, Any]:
    """Return the saved form of a case."""
    content: dict[str, Any] = swapped("gpt2", case).config.pe_swap
    return content


SAVED = {case: valid(case) for case in ("rope", "t5", "learned", "shaw-all")}

specifications = st.one_of(
    anything,
    st.fixed_dictionaries(
        {},
        optional={
            "format": st.one_of(st.just(1), st.just(1), st.just(1), anything),
            "version": anything,
            "schemes": st.one_of(st.lists(entries, max_size=4), st.lists(st.one_of(entries, anything), max_size=4), anything),
            "layers": st.one_of(st.lists(st.sampled_from([0, 1, None]), min_size=LAYERS, max_size=LAYERS), anything),
            "input": st.one_of(st.sampled_from([0, None]), anything),
            "trained_length": st.one_of(st.just(32), anything),
            "max_length": st.one_of(st.just(64), anything),
            "original_model_type": anything,
            "length": st.one_of(st.just(32), anything),
            "guarded": st.one_of(st.just(32), anything),
            "attention_hooks": st.one_of(st.just(["transform_query_key"]), anything),
            "rope_parameters": st.one_of(st.none(), anything),
        },
    ),
    st.tuples(st.sampled_from(sorted(SAVED)), st.sampled_from(sorted(SAVED["rope"])), anything).map(
        lambda change: {**SAVED[change[0]], change[1]: change[2]}
    ),
)


def numbers(assignment: Assignment, geometry: Geometry = GEOMETRY) -> int:
    """Return how many numbers the schemes of a assignment hold, building them where nothing is allocated."""
    native = Native(table=torch.ones(geometry.trained_length, geometry.hidden_size))
    resolved, _ = assignment.resolve(geometry, [native] * geometry.num_layers)
    with torch.device("meta"):
        built = resolved.build(geometry)
    return max((parameter.numel() for scheme in built for parameter in scheme.parameters()), default=0)


@settings(max_examples=250, deadline=None)
@given(data=st.data(), name=schemes)
def test_options_are_accepted_or_refused(data: st.DataObject, name: str) -> None:
    values = data.draw(option_values(name))
    try:
        options = build_options(SCHEMES[name].Options, values)
    except PESwapError:
        return
    assert build_options(SCHEMES[name].Options, json.loads(json.dumps(options.to_dict()))) == options
    with contextlib.suppress(OptionError):  # options that do not fit this geometry
        assert numbers(Assignment((options,), (0,) * LAYERS, 0)) <= MOST_NUMBERS


@settings(max_examples=300, deadline=None)
@given(saved=specifications)
def test_a_saved_specification_is_read_or_refused(saved: Any) -> None:
    try:
        assignment = from_saved(saved, LAYERS)
    except PESwapError:
        return
    assert len(assignment.layers) == LAYERS
    assert all(at is None or at < len(assignment.options) for at in (*assignment.layers, assignment.input))
    with contextlib.suppress(OptionError):
        assert numbers(assignment) <= MOST_NUMBERS


@settings(max_examples=300, deadline=None)
@given(saved=specifications)
def test_a_configuration_is_loaded_or_refused(saved: Any) -> None:
    config_class = swapped_config_class(FAMILIES["gpt2"])
    content = {"model_type": "pe_swap_gpt2", "n_layer": LAYERS, "n_head": 12, "n_embd": 96, "n_positions": "a sentence"}
    try:
        config = config_class.from_dict({**content, "pe_swap": saved})
    except PESwapError:
        return
    assert 1 <= config.n_positions <= 2**24
    assert config.pe_swap == saved
    assert json.loads(config.to_json_string())["pe_swap"]


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved.update(values)


def options(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["schemes"][0]["options"].update(values)


def named(name: object) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["schemes"][0].update(name=name)


HOSTILE = {
    "unknown-scheme": ("rope", named("ropee"), "Unknown positional scheme 'ropee'. Did you mean 'rope'? Available: "),
    "scheme-of-no-name": ("rope", named(None), "an entry must be an object with 'name' and 'options'"),
    "unknown-option": ("rope", options(bse=1), "rope: unknown option 'bse'. Did you mean 'base'?"),
    "text-for-number": ("rope", options(base="1e4"), "rope: option 'base' is '1e4'; it must be a number above 1"),
    "huge-number": ("rope", options(base=10**400), "it must be a number above 1"),
    "list-for-text": (
        "rope",
        options(layout=["half"]),
        "rope: option 'layout' is ['half']; it must be one of 'half', 'interleaved'",
    ),
    "true-for-number": (
        "t5",
        options(num_buckets=True),
        "t5: option 'num_buckets' is True; it must be an integer from 4 to 65,536",
    ),
    "a-million-buckets": (
        "t5",
        options(num_buckets=10**6),
        "option 'num_buckets' is 1000000; it must be an integer from 4 to 65,536",
    ),
    "long-table": (
        "learned",
        options(max_length=10**12),
        "option 'max_length' is 1000000000000; it must be an integer from 1 to 16,777,216",
    ),
    "wide-table": (
        "shaw-all",
        options(max_distance=10**9),
        "option 'max_distance' is 1000000000; it must be an integer from 1 to 65,536",
    ),
    "long-limit": (
        "rope",
        changed(max_length=10**12),
        "'pe_swap.max_length' is 1000000000000; it must be null or an integer from 1 to",
    ),
    "trained-long": (
        "rope",
        changed(trained_length=10**12),
        "'pe_swap.trained_length' is 1000000000000; it must be an integer from 1",
    ),
    "no-trained-length": ("rope", changed(trained_length=None), "'pe_swap.trained_length' is None; it must be an integer from 1"),
    "many-schemes": (
        "rope",
        lambda saved: saved.update(schemes=saved["schemes"] * 1000),
        "it must be a list of at most 3 schemes",
    ),
    "many-layers": ("rope", changed(layers=[0] * 100_000), "it must be a list of 2 entries, one a layer"),
    "layer-of-no-scheme": ("rope", changed(layers=[0, 1]), "each null or an index below 1"),
    "input-of-no-scheme": ("rope", changed(input=-1), "'pe_swap.input' is -1; it must be null or an index below 1"),
    "format-of-words": ("rope", changed(format="1"), "'pe_swap.format' is '1'; it must be a positive integer"),
}


@pytest.mark.parametrize("which", HOSTILE)
def test_each_of_these_is_named(which: str, tmp_path: Path) -> None:
    case, change, text = HOSTILE[which]
    swapped("gpt2", case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    change(content["pe_swap"])
    path.write_text(json.dumps(content))
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path)
        assert text in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_no_pe_swap_in_a_configuration_that_claims_one(tmp_path: Path) -> None:
    swapped("gpt2", "rope").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content["pe_swap"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model_type 'pe_swap_gpt2' but no 'pe_swap' object.*Save the model again"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_was_read_is_not_shared_with_what_was_given() -> None:
    saved = copy.deepcopy(SAVED["rope"])
    from_saved(saved, LAYERS)
    assert saved == SAVED["rope"]
