"""Swapped models in use: `generate` in its forms, packing, compilation, other backends, schemes by layer.

The covering cases stand for the others where a test adds a way of use to what the matrix shows of every case.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import pe_swap
from pe_swap.families import FAMILIES
from pe_swap.patching.install import holder_of, positional_parameters
from tests.references.alibi import slopes as reference_slopes
from tests.support.covering import COVERING, PAIRS, covering, covering_pairs, differentiated, in_modes, ways_in
from tests.support.families import is_causal, model_type_of
from tests.support.models import (
    BACKENDS,
    CASES,
    DECODERS,
    LENGTH_DEPENDENT,
    MATRIX_FAMILIES,
    PAD,
    ROUNDING,
    TRAINED_LENGTH,
    build,
    checkpoint_activations,
    disturb,
    left_padded,
    logits,
    swapped,
    token_ids,
    with_cache,
)

pytestmark = pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")


NEW = 8

every_case = pytest.mark.parametrize("case", CASES)
every_pair = pytest.mark.parametrize(("case", "family"), PAIRS)
every_family = pytest.mark.parametrize("family", MATRIX_FAMILIES)
every_decoder = pytest.mark.parametrize("family", DECODERS)
covering_decoders = pytest.mark.parametrize(("case", "family"), covering_pairs(DECODERS))


@functools.cache
def shared(family: str, case: str) -> PreTrainedModel:
    """Return one swapped model for all tests that only read it."""
    return swapped(family, case)


def generate(model: PreTrainedModel, ids: Tensor | None, new: int = NEW, **kwargs: Any) -> Tensor:
    """Return exactly `new` generated tokens after the prompt; greedy unless told otherwise."""
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": PAD, "eos_token_id": 2}
    return model.generate(ids, **{**settings, **kwargs})


# --- generate ------------------------------------------------------------------------------------------------------------------


@covering_decoders
def test_a_left_padded_batch_generates_what_each_row_does_alone(case: str, family: str) -> None:
    model, rows = shared(family, case), [token_ids(1, 14, seed=5), token_ids(1, 9, seed=6), token_ids(1, 3, seed=7)]
    ids, mask = left_padded(rows)
    together = generate(model, ids, attention_mask=mask)[:, -NEW:]
    alone = torch.cat([generate(model, row, attention_mask=torch.ones_like(row))[:, -NEW:] for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("case", [case for case in COVERING if case not in LENGTH_DEPENDENT])
@every_decoder
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beams", "sampled"],
)
def test_generating_with_a_cache_equals_generating_without(case: str, family: str, how: dict[str, Any]) -> None:
    model = shared(family, case)
    ids, mask = left_padded([token_ids(1, 12, seed=5), token_ids(1, 8, seed=6)])
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        outputs.append(generate(model, ids, attention_mask=mask, use_cache=use_cache, **how))
    assert torch.equal(*outputs)


@covering_decoders
def test_a_static_cache_and_an_assistant_generate_the_same(case: str, family: str) -> None:
    model, ids = shared(family, case), token_ids(1, 11, seed=8)
    mask = torch.ones_like(ids)
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, cache_implementation="static"), expected)
    assistant = copy.deepcopy(model)
    assert torch.equal(generate(model, ids, attention_mask=mask, assistant_model=assistant), expected)
    disturb(assistant)  # one that is wrong at times: its guesses are cropped from the cache again
    assert torch.equal(generate(model, ids, attention_mask=mask, assistant_model=assistant), expected)


@pytest.mark.parametrize(("case", "family"), [*((case, "gpt2") for case in CASES), *covering_pairs(["bert-decoder"])])
def test_generating_beyond_the_trained_length(case: str, family: str) -> None:
    model, ids = shared(family, case), token_ids(2, 25)
    limit, new = holder_of(model).max_length, 15
    if limit is not None and limit < ids.shape[1] + new - 1:
        with pytest.raises(pe_swap.errors.PositionRangeError, match=f"^Position {limit} is beyond the {limit} that the scheme"):
            generate(model, ids, new)
        return
    cached = generate(model, ids, new)
    assert cached.shape == (2, 40)
    assert ((cached >= 0) & (cached < model.config.vocab_size)).all()
    assert torch.equal(generate(model, ids, new, use_cache=False), cached)


@every_decoder
def test_without_a_swap_the_trained_length_is_the_end(family: str) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        generate(build(family), token_ids(1, 25), 15)


# --- inputs and outputs --------------------------------------------------------------------------------------------------------


@every_pair
def test_input_embeddings_stand_for_input_ids(case: str, family: str) -> None:
    model, ids = shared(family, case), token_ids(2, 14)
    embeddings = model.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(logits(model, inputs_embeds=embeddings), logits(model, ids), **ROUNDING)


@covering_decoders
def test_generation_goes_on_from_input_embeddings(case: str, family: str) -> None:
    model, ids = shared(family, case), token_ids(2, 14)
    embeddings, mask = model.get_input_embeddings()(ids).detach(), torch.ones_like(ids)
    continued = generate(model, None, inputs_embeds=embeddings, attention_mask=mask)
    assert torch.equal(continued, generate(model, ids, attention_mask=mask)[:, -NEW:])


@every_pair
def test_attention_probabilities_are_probabilities(case: str, family: str) -> None:
    model, ids = swapped(family, case, "eager"), token_ids(2, 10)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == 2
    for probabilities in attentions:
        assert probabilities.shape == (2, 12, 10, 10)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 12, 10), atol=1e-6, rtol=0)
        future = probabilities[..., torch.ones(10, 10).triu(1).bool()]
        assert (future == 0).all() if is_causal(family) else (future > 0).any()


@every_family
def test_attention_probabilities_show_the_bias_of_alibi(family: str) -> None:
    """With queries of zero every score is zero, and `log p_ij - log p_ii = -slope * |i - j|`."""
    model = pe_swap.swap_positional(build(family, "eager"), "alibi")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".query." in name:
                parameter.zero_()
            elif ".c_attn." in name:  # GPT-2's queries, keys and values
                parameter[..., :96] = 0
        attentions = model(token_ids(1, 9), output_attentions=True).attentions
    slopes = torch.tensor([float(slope) for slope in reference_slopes(12)], dtype=torch.float64)
    place = torch.arange(9)
    distance = (place[None, :] - place[:, None]).abs()
    wanted = -slopes[:, None, None] * distance
    allowed = distance.new_ones(9, 9).tril().bool() if is_causal(family) else torch.ones(9, 9, dtype=torch.bool)
    for probabilities in attentions:
        logarithm = probabilities[0].double().log()
        found = logarithm - logarithm.diagonal(dim1=-2, dim2=-1)[..., None]
        torch.testing.assert_close(found[:, allowed], wanted[:, allowed], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "family", "backend", "use_reentrant"),
    [
        *((case, family, "sdpa", True) for case, family in covering_pairs(MATRIX_FAMILIES)),
        *((case, family, "eager", False) for case, family in covering_pairs(["gpt2", "bert"])),
    ],
)
def test_checkpointed_gradients_are_the_gradients(case: str, backend: str, use_reentrant: bool, family: str) -> None:
    """The matrix holds the other part: every case, sdpa without reentrance."""
    ids, found = token_ids(2, 18), []
    for checkpointed in (False, True):
        model = swapped(family, case, backend).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant)
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys() >= {name for name, _ in positional_parameters(model)}
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# --- packing -------------------------------------------------------------------------------------------------------------------

PACKED = (11, 6, 9)


@pytest.mark.parametrize(("case", "family", "backend"), in_modes(["gpt2"], ("sdpa", "eager")))
def test_position_ids_that_start_again_keep_packed_sequences_apart(case: str, family: str, backend: str) -> None:
    """GPT-2 alone: transformers reads packing from position ids in the masks of models that hand them on, and BERT does not."""
    model = swapped(family, case, backend)
    sequences = [token_ids(2, length, seed=length) for length in PACKED]
    position_ids = torch.cat([torch.arange(length) for length in PACKED])[None].expand(2, -1)
    packed = logits(model, torch.cat(sequences, dim=1), position_ids=position_ids, use_cache=False)
    torch.testing.assert_close(packed, torch.cat([logits(model, ids) for ids in sequences], dim=1), **ROUNDING)


@pytest.mark.parametrize(("case", "family", "backend"), in_modes(MATRIX_FAMILIES, ("sdpa", "eager")))
def test_a_block_mask_keeps_packed_sequences_apart(case: str, family: str, backend: str) -> None:
    model = swapped(family, case, backend)
    sequences = [token_ids(2, length, seed=length) for length in PACKED]
    position_ids = torch.cat([torch.arange(length) for length in PACKED])[None].expand(2, -1)
    number = torch.repeat_interleave(torch.arange(len(PACKED)), torch.tensor(PACKED))
    may_look = number[:, None] == number[None, :]
    if is_causal(family):
        may_look = may_look.tril()
    mask = may_look.expand(2, 1, -1, -1)
    if backend == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    packed = logits(model, torch.cat(sequences, dim=1), position_ids=position_ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(packed, torch.cat([logits(model, ids) for ids in sequences], dim=1), **ROUNDING)


# --- compilation ---------------------------------------------------------------------------------------------------------------


COMPILED = ("rope", "alibi", "t5", "sinusoidal", "none", "shaw-all", "fox", "fire", "transformer-xl")
"""Cases known to compile; of them those run that together have every hook, and in training every hook with weights and without."""


@pytest.mark.parametrize(
    ("case", "family"), [*((case, "gpt2") for case in covering(COMPILED, of=ways_in)), ("rope", "bert"), ("shaw", "bert")]
)
def test_a_compiled_forward_is_one_graph_and_equal(case: str, family: str) -> None:
    torch.compiler.reset()
    model, ids = shared(family, case), token_ids(2, TRAINED_LENGTH + 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), logits(model, ids, use_cache=False), **ROUNDING)


@pytest.mark.parametrize(
    ("case", "family"), [*((case, "gpt2") for case in covering(COMPILED, of=differentiated)), ("t5", "bert")]
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what PyTorch's compiler itself does
def test_a_compiled_training_step_is_one_graph_and_gives_the_same_gradients(case: str, family: str) -> None:
    torch.compiler.reset()
    model, ids = swapped(family, case), token_ids(2, TRAINED_LENGTH + 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for each in (model, compiled):
        model.zero_grad(set_to_none=True)
        arguments = {"use_cache": False} if is_causal(family) else {}
        each(ids, labels=ids, **arguments).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", covering(COMPILED, of=ways_in))
def test_compiled_decode_steps_with_a_static_cache_are_one_graph_and_equal(case: str) -> None:
    torch.compiler.reset()
    model, ids = shared("gpt2", case), token_ids(2, 15)
    whole = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=20)
    parts = [logits(model, ids[:, :12], **with_cache(model, cache))]
    for place in range(12, 15):
        given = {"position_ids": torch.full((2, 1), place), **with_cache(model, cache)}
        parts.append(logits(compiled, ids[:, place : place + 1], **given))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **ROUNDING)


# --- schemes by layer ----------------------------------------------------------------------------------------------------------

Step = tuple[str, dict[str, Any]]

BY_LAYER: dict[str, list[Step]] = {
    "rope-then-none": [("rope", {"layers": [0]})],
    "rope-and-none": [("none", {}), ("rope", {"layers": [0]})],
    "alibi-and-t5": [("alibi", {"layers": [0]}), ("t5", {"layers": [1], "num_buckets": 8, "max_distance": 12})],
    "t5-and-shaw": [("t5", {"layers": [0], "num_buckets": 8, "max_distance": 12}), ("shaw", {"layers": [-1], "max_distance": 4})],
    "two-ropes": [("rope", {}), ("rope", {"layers": [1], "base": 100.0})],
    "sinusoidal-and-rope": [("sinusoidal", {}), ("rope", {"layers": [1]})],
    "concat-and-alibi": [("concat", {}), ("alibi", {"layers": [0], "trainable": True})],
}
every_split = pytest.mark.parametrize("split", BY_LAYER)


def split_model(family: str, split: str, backend: str = "sdpa") -> PreTrainedModel:
    """Return a model whose layers have different schemes, all moved off their start."""
    model = build(family, backend)
    for scheme, options in BY_LAYER[split]:
        pe_swap.swap_positional(model, scheme, **options)
    disturb(model)
    return model


@every_split
@every_decoder
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_with_different_schemes_cached_equals_uncached(split: str, family: str, backend: str) -> None:
    model, ids = split_model(family, split, backend), token_ids(2, TRAINED_LENGTH + 4)
    whole = logits(model, ids)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        parts, start = [], 0
        for length in (20, 7, 1, 1, 7):
            parts.append(logits(model, ids[:, start : start + length], **with_cache(model, cache)))
            start += length
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **ROUNDING)
    rows = [token_ids(1, 12, seed=5), token_ids(1, 8, seed=6)]
    padded, mask = left_padded(rows)
    together = generate(model, padded, attention_mask=mask)
    assert torch.equal(together, generate(model, padded, attention_mask=mask, use_cache=False))
    alone = torch.cat([generate(model, row, attention_mask=torch.ones_like(row))[:, -NEW:] for row in rows])
    assert torch.equal(together[:, -NEW:], alone)


@every_split
@every_family
def test_layers_with_different_schemes_are_restored(split: str, family: str) -> None:
    plain, model, ids = build(family), split_model(family, split), token_ids(2, 20)
    before = logits(plain, ids)
    assert (logits(model, ids) - before).abs().max() > 1e-3
    pe_swap.restore_positional(model)
    assert torch.equal(logits(model, ids), before)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


@every_family
def test_a_scheme_in_one_layer_acts_there_alone(family: str) -> None:
    """In the layer that was given `none` the attention is the unswapped module's own."""
    model = split_model(family, "rope-then-none", "eager")
    everywhere = pe_swap.swap_positional(build(family, "eager"), "rope")
    nowhere = pe_swap.swap_positional(build(family, "eager"), "none")
    ids = token_ids(1, 12)
    with torch.no_grad():
        found, roped, bare = (each(ids, output_attentions=True).attentions for each in (model, everywhere, nowhere))
    assert torch.equal(found[0], roped[0])
    assert (found[0] - bare[0]).abs().max() > 1e-3
    stack = FAMILIES[model_type_of(family)].stacks[0]
    first = stack.attention_modules(model.base_model, model.config)[0]
    assert hasattr(first, "pe_swap_binding")
    assert sum(hasattr(module, "pe_swap_binding") for module in model.modules()) == 1
    assert (found[1] - roped[1]).abs().max() > 1e-3


@every_family
@pytest.mark.parametrize("kept", ["t5", "alibi-trained", "shaw-all", "sinusoidal", "concat", "learned"])
def test_swapping_one_layer_keeps_what_the_other_learned(family: str, kept: str) -> None:
    model = swapped(family, kept)
    scheme = CASES[kept][0]

    def held() -> dict[str, Tensor]:
        """Return the kept scheme's parameters by their name within it."""
        holder = holder_of(model)
        scheme_kept = next(each for each in map(holder.scheme_at, range(len(holder.schemes))) if each.name == scheme)
        return {name: value.clone() for name, value in scheme_kept.state_dict().items()}

    before = held()
    pe_swap.swap_positional(model, "rope", layers=[1])
    after = held()
    lost = {name for name in before if name not in after}
    assert lost == {name for name in before if name.endswith("tables.1")}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert after or scheme == "sinusoidal"
    pe_swap.swap_positional(model, "rope", layers=[1], base=50.0)
    assert all(torch.equal(value, before[name]) for name, value in held().items())
