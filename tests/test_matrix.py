"""What must hold for every scheme in every family under every backend. The matrix is read from the registries.

Every case runs in the first mode of a test; in its other modes the covering cases do.
"""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import pe_swap
from pe_swap.attention import blockwise, relative
from pe_swap.patching.install import holder_of, positional_parameters
from pe_swap.schemes import SCHEMES
from tests.support.covering import PAIRS, covering_pairs, in_modes
from tests.support.families import is_causal
from tests.support.models import (
    BACKENDS,
    CASES,
    DECODERS,
    LENGTH_DEPENDENT,
    MATRIX_FAMILIES,
    ROUNDING,
    build,
    checkpoint_activations,
    disturb,
    logits,
    swapped,
    token_ids,
    with_cache,
)

pytestmark = pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")


every_case = pytest.mark.parametrize("case", CASES)
every_pair = pytest.mark.parametrize(("case", "family"), PAIRS)
every_family = pytest.mark.parametrize("family", MATRIX_FAMILIES)
every_decoder = pytest.mark.parametrize("family", DECODERS)
in_every_backend = pytest.mark.parametrize(("case", "family", "backend"), in_modes(MATRIX_FAMILIES, ("sdpa", "eager")))
in_every_backend_of_decoders = pytest.mark.parametrize(("case", "family", "backend"), in_modes(DECODERS, ("sdpa", "eager")))


@pytest.mark.parametrize("scheme", SCHEMES.names())
def test_every_scheme_is_in_the_matrix(scheme: str) -> None:
    assert scheme in {name for name, _ in CASES.values()}, "give it a line in CASES of tests/support/models.py"


@pytest.mark.parametrize("case", [case for case in CASES if SCHEMES[CASES[case][0]].causal_only])
def test_a_causal_scheme_refuses_an_encoder_and_leaves_it_alone(case: str) -> None:
    model, ids = build("bert"), token_ids(1, 10)
    before = logits(model, ids)
    name, options = CASES[case]
    with pytest.raises(pe_swap.errors.UnsupportedModelError, match=f"The scheme '{name}' is defined for causal attention only"):
        pe_swap.swap_positional(model, name, **options)
    assert torch.equal(logits(model, ids), before)


@in_every_backend
def test_swap_changes_the_output_and_restore_is_bit_for_bit(case: str, family: str, backend: str) -> None:
    model, ids = build(family, backend), token_ids(2, 20)
    before = logits(model, ids)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    name, options = CASES[case]
    assert pe_swap.swap_positional(model, name, **options) is model
    disturb(model)
    assert (logits(model, ids) - before).abs().max() > 1e-3
    pe_swap.restore_positional(model)
    assert torch.equal(logits(model, ids), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert type(model.config) is type(build(family).config)
    assert not any(module._forward_pre_hooks for module in model.modules())


@every_pair
def test_eager_equals_sdpa(case: str, family: str) -> None:
    model, ids = swapped(family, case, "eager"), token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    eager, eager_padded = logits(model, ids), logits(model, ids, attention_mask=mask)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(model, ids), eager, **ROUNDING)
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[mask.bool()], eager_padded[mask.bool()], **ROUNDING)


@pytest.mark.parametrize(("case", "family", "length"), in_modes(MATRIX_FAMILIES, (17, 23)))
def test_blocks_of_queries_equal_eager(case: str, family: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of 17 is of one query, as is that of 257 where blocks are as they are: no call of a single query."""
    model, ids = swapped(family, case, "eager"), token_ids(2, length)
    eager = logits(model, ids)
    model.set_attn_implementation("sdpa")
    for module in (blockwise, relative):
        for name in {"QUERY_BLOCK", "CAUSAL_BLOCK", "MASKED_BLOCK"} & vars(module).keys():
            monkeypatch.setattr(module, name, 8)
    torch.testing.assert_close(logits(model, ids), eager, **ROUNDING)
    if is_causal(family) and case not in LENGTH_DEPENDENT:
        torch.testing.assert_close(cached_in_chunks(model, ids, "dynamic", (6, 9, length - 15)), eager, **ROUNDING)


# transformers' own function for dynamic rope computes in torch's default dtype.
@pytest.mark.parametrize(("case", "family"), [pair for pair in covering_pairs(MATRIX_FAMILIES) if pair[0] != "rope-dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_torch_s_default_dtype_changes_nothing(case: str, family: str, dtype: torch.dtype) -> None:
    model, ids = swapped(family, case), token_ids(2, 24)

    def outputs() -> list[Tensor]:
        parts = [] if not is_causal(family) else [cached_in_chunks(model, ids, "dynamic", (20, 1, 3))]
        return [logits(model, ids), *parts]

    before = outputs()
    torch.set_default_dtype(dtype)
    try:
        after = outputs()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, before, after))


@in_every_backend_of_decoders
def test_the_future_is_not_seen(case: str, family: str, backend: str) -> None:
    model, ids = swapped(family, case, backend), token_ids(1, 20)
    changed = ids.clone()
    changed[:, 12:] = token_ids(1, 8, seed=4)
    first, second = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(first[:, :12], second[:, :12], **ROUNDING)
    assert (first[:, 12:] - second[:, 12:]).abs().max() > 1e-3


def cached_in_chunks(model: PreTrainedModel, ids: Tensor, cache: str, lengths: tuple[int, ...]) -> Tensor:
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=29)
    with torch.no_grad():
        parts = [model(chunk, **with_cache(model, past)).logits for chunk in ids.split(lengths, dim=1)]
    return torch.cat(parts, dim=1)


CACHES = ("dynamic", "static")


def test_only_length_dependent_cases_do_not_claim_that_caches_change_nothing() -> None:
    models = {case: holder_of(swapped("gpt2", case)) for case in CASES}
    assert {case for case in CASES if not models[case].scheme_at(0).cached_equals_uncached} == set(LENGTH_DEPENDENT)


@pytest.mark.parametrize(
    ("case", "family", "mode"), in_modes(DECODERS, [(backend, cache) for backend in ("sdpa", "eager") for cache in CACHES])
)
def test_cached_in_chunks_equals_uncached(case: str, family: str, mode: tuple[str, str]) -> None:
    backend, cache = mode
    model, ids = swapped(family, case, backend), token_ids(2, 24)
    lengths = (11, 6, 1, 1, 5)  # prefill, a chunk, two tokens, a chunk as assisted decoding sends it
    whole, parts = logits(model, ids, use_cache=False), cached_in_chunks(model, ids, cache, lengths)
    if case not in LENGTH_DEPENDENT:
        torch.testing.assert_close(parts, whole, **ROUNDING)
        return
    # Keys of a first layer come from the tokens alone: there, the last chunk must meet all of them as an uncached pass does.
    assert (parts[:, -5:] - whole[:, -5:]).abs().max() > 1e-4
    model = swapped(family, case, backend, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1})
    whole, parts = logits(model, ids, use_cache=False), cached_in_chunks(model, ids, cache, lengths)
    torch.testing.assert_close(parts[:, -5:], whole[:, -5:], **ROUNDING)


@pytest.mark.parametrize(
    ("case", "family", "mode"),
    in_modes(MATRIX_FAMILIES, [(backend, side) for backend in ("sdpa", "eager") for side in ("left", "right")]),
)
def test_padded_equals_unpadded(case: str, family: str, mode: tuple[str, str]) -> None:
    backend, side = mode
    model = swapped(family, case, backend)
    rows = [token_ids(1, 20, seed=5), token_ids(1, 13, seed=6)]
    alone = [logits(model, row)[0] for row in rows]
    padded, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(20 - row.shape[1], 20) if side == "left" else slice(0, row.shape[1])
        padded[index, where], mask[index, where] = row[0], 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(model, padded, attention_mask=mask, position_ids=position_ids)
    for index, expected in enumerate(alone):
        torch.testing.assert_close(together[index][mask[index].bool()], expected, **ROUNDING)


@every_pair
def test_shift_invariance_is_as_claimed(case: str, family: str) -> None:
    model, ids = swapped(family, case), token_ids(1, 12)
    claimed = holder_of(model).scheme_at(0).shift_invariant
    mask, here = torch.ones_like(ids), torch.arange(12)[None]
    difference = (
        (
            logits(model, ids, attention_mask=mask, position_ids=here)
            - logits(model, ids, attention_mask=mask, position_ids=here + 17)
        )
        .abs()
        .max()
    )
    assert (difference < 1e-4) if claimed else (difference > 1e-3)


@in_every_backend
def test_gradients_reach_every_parameter(case: str, family: str, backend: str) -> None:
    model, ids = swapped(family, case, backend), token_ids(2, 30)
    model.train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "pooler" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert {name for name, _ in positional_parameters(model)} <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("case", "family"), covering_pairs(DECODERS))
def test_labels_beside_left_padding_train_as_in_eager_attention(case: str, family: str) -> None:
    """What padding gets is a mean of values in eager attention and zeros in a kernel; neither sends back more than real tokens do.

    The last token of padding has the first real one for its label.
    """
    ids, mask = token_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    labels, position_ids = ids.masked_fill(mask == 0, -100), (mask.cumsum(-1) - 1).clamp(min=0)
    norms = []
    for backend in BACKENDS:
        model = swapped(family, case, backend)
        model.train()
        model(ids, attention_mask=mask, position_ids=position_ids, labels=labels, use_cache=False).loss.backward()
        gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.3)


@every_pair
def test_gradients_are_the_same_under_both_backends_and_checkpointing(case: str, family: str) -> None:
    ids = token_ids(2, 30)
    found = []
    for backend, checkpointed in (("eager", False), ("sdpa", False), ("sdpa", True)):
        model = swapped(family, case, backend)
        model.train()
        if checkpointed:
            checkpoint_activations(model)
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(
                gradient, found[0][name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize(("case", "family"), covering_pairs(MATRIX_FAMILIES))
def test_a_deep_copy_follows_its_own_scheme(case: str, family: str) -> None:
    model, ids = swapped(family, case), token_ids(1, 10)
    before = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), before)
    assert holder_of(twin) is not holder_of(model)
    pe_swap.restore_positional(twin)
    assert torch.equal(logits(model, ids), before)
    assert (logits(twin, ids) - before).abs().max() > 1e-3


@every_pair
def test_longer_than_trained_without_position_ids(case: str, family: str) -> None:
    model = swapped(family, case)
    limit = holder_of(model).max_length
    if limit is None or limit > 40:
        assert logits(model, token_ids(1, 41)).isfinite().all()
    else:
        with pytest.raises(pe_swap.errors.PositionRangeError, match=f"beyond the {limit} that the scheme"):
            logits(model, token_ids(1, 41))


@every_pair
def test_bfloat16_runs_and_stays_near_float32(case: str, family: str) -> None:
    model, ids = swapped(family, case), token_ids(1, 20)
    wide = logits(model, ids)
    narrow = logits(model.to(torch.bfloat16), ids)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).norm() / wide.norm() < 0.06


@every_pair
def test_a_swap_warns_only_of_a_bag_of_words(case: str, family: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swapped(family, case)
    expected = ["The scheme 'none' on an encoder"] if (CASES[case][0], family) == ("none", "bert") else []
    assert [str(warning.message)[:31] for warning in caught] == expected


@every_family
def test_the_loss_has_its_name_while_swapped_and_transformers_says_nothing(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = build(family), token_ids(1, 8)
    own = model.loss_type
    pe_swap.swap_positional(model, "rope")
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        model(ids, labels=ids)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert model.loss_type == ("ForCausalLM" if is_causal(family) else "ForMaskedLM")
    assert pe_swap.restore_positional(model).loss_type == own
