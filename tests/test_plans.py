"""Plans of layers and windows: held against the models of transformers that are built so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import pe_swap
from pe_swap.errors import LayerError, OptionError
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, parameters_of
from tests.support.families import ROUNDING, difference, outputs, tiny, token_ids

WINDOW = 6


def with_weights_of(model: PreTrainedModel, family: str, **overrides: Any) -> PreTrainedModel:
    """Return a tiny model of a family with the weights of another one."""
    other = tiny(family, **overrides)
    other.load_state_dict(model.state_dict())
    return other


def test_nope_every_4_is_smollm3() -> None:
    llama, ids = tiny("llama", num_hidden_layers=4), token_ids(2, 20)
    theirs = {"no_rope_layers": [1, 1, 1, 0], "rope_parameters": llama.config.rope_parameters, "tie_word_embeddings": False}
    smollm3 = with_weights_of(llama, "smollm3", num_hidden_layers=4, **theirs)
    expected = outputs(smollm3, ids)
    assert difference(outputs(llama, ids), expected) > 1e-3
    assert torch.equal(outputs(pe_swap.swap_positional(llama, plan="nope_every_4"), ids), expected)


def mistral() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a Llama with a window in every layer, and a Mistral with the same weights."""
    llama = tiny("llama", head_dim=8)
    own = with_weights_of(llama, "mistral", sliding_window=WINDOW, rope_parameters=llama.config.rope_parameters)
    return pe_swap.swap_positional(llama, "rope", sliding_window=WINDOW), own


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rope_with_a_window_is_mistral(attention: str) -> None:
    (swapped, own), ids = mistral(), token_ids(2, 20)
    swapped.config._attn_implementation = attention
    assert difference(outputs(swapped, ids), outputs(own, ids)) <= ROUNDING
    assert difference(outputs(swapped, ids), outputs(tiny("llama", head_dim=8), ids)) > 1e-3
    row, mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids[:1]), dim=1), torch.tensor([[0] * 5 + [1] * 20])
    assert (
        difference(outputs(swapped, row, attention_mask=mask)[:, 5:], outputs(own, row, attention_mask=mask)[:, 5:]) <= ROUNDING
    )


def test_a_window_with_a_cache_and_after_a_reload(tmp_path: Path) -> None:
    (swapped, own), ids = mistral(), token_ids(2, 20)
    expected = outputs(own, ids)
    name = next(name for name in CACHE_ARGUMENTS if name in parameters_of(swapped))
    cache = DynamicCache(config=swapped.config)
    parts = [outputs(swapped, ids[:, start:stop], use_cache=True, **{name: cache}) for start, stop in ((0, 9), (9, 10), (10, 20))]
    assert difference(torch.cat(parts, dim=1), expected) <= ROUNDING
    swapped.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, ids), outputs(swapped, ids))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(swapped.generate(ids, **settings), own.generate(ids, **settings))


def test_scaling_by_length_counts_the_keys_in_the_window() -> None:
    """A Mistral's window is in its mask, which is what is counted."""
    scaled = {"logit_scale": "log_n", "trained_length": 2}
    (_, own), ids = mistral(), token_ids(2, 20)
    expected = outputs(pe_swap.swap_positional(own, "rope", **scaled), ids)
    llama = tiny("llama", head_dim=8)
    assert difference(outputs(pe_swap.swap_positional(llama, "rope", sliding_window=WINDOW, **scaled), ids), expected) <= ROUNDING
    with pytest.raises(OptionError, match="'sliding_window' is 3 in an encoder"):
        pe_swap.swap_positional(tiny("bert"), "t5", sliding_window=3, logit_scale="log_n")


@pytest.mark.parametrize("scheme", ["alibi", "shaw", "none", "sinusoidal", "fox"])
def test_with_a_window_nothing_further_back_acts(scheme: str) -> None:
    model = pe_swap.swap_positional(tiny("llama", num_hidden_layers=1), scheme, sliding_window=WINDOW)
    ids, changed = token_ids(1, 20), token_ids(1, 20)
    changed[:, : 20 - WINDOW] = token_ids(1, 20 - WINDOW, seed=4)
    assert difference(outputs(model, changed)[:, -1], outputs(model, ids)[:, -1]) <= ROUNDING
    changed[:, 20 - WINDOW] += 1
    assert difference(outputs(model, changed)[:, -1], outputs(model, ids)[:, -1]) > 1e-4


def test_a_window_in_an_encoder_goes_both_ways() -> None:
    model = pe_swap.swap_positional(tiny("bert", num_hidden_layers=1), "t5", sliding_window=3)
    ids = token_ids(1, 20)
    expected = outputs(model, ids)[0]
    ids[0, 10] += 1
    moved = (outputs(model, ids)[0] - expected).abs().amax(-1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


def test_local_rope_and_global_nope() -> None:
    model, ids = tiny("llama", num_hidden_layers=4), token_ids(2, 20)
    one = outputs(pe_swap.swap_positional(model, plan="rope_local_nope_global", sliding_window=WINDOW), ids)
    pe_swap.restore_positional(model)
    pe_swap.swap_positional(model, "rope", layers=[0, 1, 2], sliding_window=WINDOW)
    assert torch.equal(outputs(pe_swap.swap_positional(model, "none", layers="every:4"), ids), one)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("every:2", [1, 3]), ("not every:2", [0, 2, 4]), ("first_half", [0, 1]), ("second_half", [2, 3, 4])],
)
def test_layers_in_words(layers: str, expected: list[int]) -> None:
    model = pe_swap.swap_positional(tiny("llama", num_hidden_layers=5), "none", layers=layers)
    assert [layer for layer, at in enumerate(model.config.pe_swap["layers"]) if at is not None] == expected


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"plan": "nope_every_5"}, OptionError, "Did you mean 'nope_every_4'"),
        ({"plan": "nope_every_4"}, LayerError, "the model has 3 layers; it must name layers"),
        ({"plan": "nope_every_4", "base": 3.0}, OptionError, "takes no options; it was given base"),
        ({"plan": "rope_local_nope_global"}, OptionError, "needs sliding_window="),
        ({"plan": "nope_every_4", "layers": [0]}, OptionError, "names the layers itself"),
        ({"plan": "nope_every_4", "scheme": "rope"}, OptionError, "got 'rope' and the plan"),
        ({}, OptionError, "scheme is None"),
        ({"scheme": "none", "layers": "each:2"}, LayerError, "in words it must be one of every:N"),
        ({"scheme": "none", "layers": "every:0"}, LayerError, "in words it must be one of every:N"),
        ({"scheme": "rope", "sliding_window": 0}, OptionError, "option 'sliding_window' is 0"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model, ids = tiny("llama"), token_ids(1, 9)
    expected = outputs(model, ids)
    with pytest.raises(error, match=text):
        pe_swap.swap_positional(model, **arguments)
    assert torch.equal(outputs(model, ids), expected)
    assert "pe_swap" not in model.config.to_dict()


def test_a_plan_that_leaves_layers_as_they_are_is_refused_where_positions_are_a_table() -> None:
    model, ids = tiny("gpt2", num_hidden_layers=4), token_ids(1, 9)
    expected = outputs(model, ids)
    with pytest.raises(OptionError, match="a table that all layers share"):
        pe_swap.swap_positional(model, plan="nope_every_4")
    assert torch.equal(outputs(model, ids), expected)
    pe_swap.swap_positional(pe_swap.swap_positional(model, "rope"), plan="nope_every_4")
    assert model.config.pe_swap["layers"] == [0, 0, 0, 1]
