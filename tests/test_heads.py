"""Every head class of every family, found through its family, and the cross-attention that no swap may touch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EncoderDecoderModel, GPT2LMHeadModel, PreTrainedModel

import pe_swap
from pe_swap.families import FAMILIES
from pe_swap.families.classes import modeling_of, pretrained_class_of
from pe_swap.patching.install import holder_of
from tests.support.families import EOS, IDS_ONLY, config_of, described_alike, exported_heads, inputs_of
from tests.support.models import (
    BACKENDS,
    DECODERS,
    MATRIX_FAMILIES,
    ROUNDING,
    TRAINED_LENGTH,
    build,
    disturb,
    token_ids,
)

LONGER = TRAINED_LENGTH + 9

SCHEMES: dict[str, dict[str, Any]] = {"rope": {}, "alibi": {}, "t5": {}, "learned": {"max_length": 64}, "concat": {}}

HEADS = [(family, head.__name__) for family in described_alike() for head in exported_heads(family)]
"""Every head class of one family for each description."""

NO_STACK = {"WhisperForAudioClassification"}
"""Heads on the part of a model whose positions are no tokens'."""

CASES = [
    (family, head, scheme)
    for family, head in HEADS
    if head not in NO_STACK
    for scheme in (SCHEMES if family in MATRIX_FAMILIES else ("alibi", "concat"))
    if scheme != "concat" or not (family in IDS_ONLY or FAMILIES[family].takes_images)
]


def build_head(family: str, name: str, **config: Any) -> PreTrainedModel:
    """Return a small model with the head called `name`; every matrix is large enough for positions to show."""
    torch.manual_seed(1)
    head = next(head for head in FAMILIES[family].head_classes() if head.__name__ == name)
    is_decoder = {"is_decoder": True} if name == "BertLMHeadModel" else {}
    model = head(config_of(family, **is_decoder, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model.eval()


def ids_for(name: str, length: int) -> Tensor:
    """Return token ids in the shape the head takes: `[batch, length]`, or `[batch, choices, length]`; the last one ends the row."""
    ids = token_ids(6, length) if name.endswith("MultipleChoice") else token_ids(2, length)
    ids[:, -1] = EOS
    return ids.view(2, 3, length) if name.endswith("MultipleChoice") else ids


OF_NOISE = {"mask", "ids_restore"}
"""Outputs of ViTMAE that say which patches went; positions have no part in them."""


def tensors_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return every floating tensor of the output that positions have a part in, caches aside."""
    with torch.no_grad():
        output = model(**inputs_of(model, ids))
    return {name: value for name, value in output.items() if isinstance(value, Tensor) and name not in OF_NOISE}


def test_no_head_is_forgotten() -> None:
    for family in described_alike():
        modeling = modeling_of(family)
        exported = {name for name in modeling.__all__ if isinstance(getattr(modeling, name), type)}
        models = {name for name in exported if issubclass(getattr(modeling, name), PreTrainedModel)}
        models -= {parent.__name__ for parent in pretrained_class_of(family).__mro__}
        of_the_family = {name for name in models if getattr(modeling, name).config_class is FAMILIES[family].config_class}
        of_the_family -= {name for name in models if getattr(modeling, name).forward is nn.Module.forward}  # BART's old aliases
        assert of_the_family == {head.__name__ for head in exported_heads(family)}
        assert len(of_the_family) >= (
            1 if FAMILIES[family].takes_images else 2
        )  # SigLIP's other heads are of text and images together


@pytest.mark.parametrize(("family", "head", "scheme"), CASES)
def test_every_head_swaps_runs_longer_and_is_restored(family: str, head: str, scheme: str) -> None:
    model = build_head(family, head)
    short, long = ids_for(head, 20), ids_for(head, LONGER)
    before = tensors_of(model, short)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pe_swap.swap_positional(model, scheme, **SCHEMES[scheme])
    disturb(model)
    after = tensors_of(model, short)
    assert before.keys() == after.keys()
    parts = {stack.name for stack in FAMILIES[family].stacks}
    own_schemes = {stack.native.own_scheme for stack in FAMILIES[family].stacks} & {"alibi"}  # BLOOM's, without an option to move
    for name, value in after.items():
        if (name.startswith("encoder_") and "encoder" not in parts) or scheme in own_schemes:
            continue
        assert (value - before[name]).abs().max() > 1e-3 * before[name].abs().max(), name
    for name, value in tensors_of(model, long).items():
        assert value.isfinite().all(), name
    pe_swap.restore_positional(model)
    restored = tensors_of(model, short)
    assert all(torch.equal(restored[name], value) for name, value in before.items())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("head", NO_STACK)
def test_a_head_without_layers_to_swap_is_refused(head: str) -> None:
    family = next(family for family, name in HEADS if name == head)
    with pytest.raises(pe_swap.errors.UnsupportedModelError, match=f"{head} has no layers whose positions"):
        pe_swap.swap_positional(build_head(family, head), "alibi")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_double_heads_with_a_dimension_for_choices(scheme: str) -> None:
    model = pe_swap.swap_positional(build_head("gpt2", "GPT2DoubleHeadsModel"), scheme, **SCHEMES[scheme])
    disturb(model)
    flat = token_ids(6, LONGER)
    choices = flat.view(2, 3, LONGER)
    if scheme == "concat":  # the module sees the ids before it flattens them
        with pytest.raises(pe_swap.errors.UnsupportedModelError) as caught:
            model(choices)
        assert str(caught.value) == (
            f"The scheme 'concat' replaces token embeddings and needs input_ids of shape [batch, length], got [2, 3, {LONGER}]. Flatten "
            "the choices into the batch, or use a scheme that adds a vector."
        )
        return
    expected, found = tensors_of(model, flat), tensors_of(model, choices)
    torch.testing.assert_close(found["logits"].flatten(0, 1), expected["logits"], **ROUNDING)
    torch.testing.assert_close(found["mc_logits"].flatten(), expected["mc_logits"].flatten(), **ROUNDING)


# --- cross-attention -----------------------------------------------------------------------------------------------------------


def cross_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the cross-attention modules by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("crossattention")}


def record_calls(model: nn.Module) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Return a dictionary that every cross-attention call fills with its arguments and its first result."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = (args, kwargs, output[0])

        return record

    for name, module in cross_attentions(model).items():
        module.register_forward_hook(recorder(name), with_kwargs=True)
    return calls


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", [*SCHEMES, "shaw", "none"])
def test_cross_attention_is_left_alone(family: str, backend: str, scheme: str) -> None:
    """Given what the swapped model's cross-attention was given, the unswapped model's returns the same bits."""
    plain = build(family, backend, add_cross_attention=True)
    model = pe_swap.swap_positional(copy.deepcopy(plain), scheme, **SCHEMES.get(scheme, {}))
    disturb(model)
    encoded = torch.randn(2, 7, 96)
    encoder_mask = torch.ones(2, 7, dtype=torch.long)
    encoder_mask[1, 4:] = 0
    given = {"encoder_hidden_states": encoded, "encoder_attention_mask": encoder_mask, "use_cache": False}
    calls = record_calls(model)
    with torch.no_grad():
        swapped_logits = model(token_ids(2, 20), **given).logits
        assert (swapped_logits - plain(token_ids(2, 20), **given).logits).abs().max() > 1e-3
        untouched = cross_attentions(plain)
        assert len(calls) == len(untouched) == 2
        for name, (args, kwargs, output) in calls.items():
            assert torch.equal(untouched[name](*args, **kwargs)[0], output), name
    assert not any(
        "pe_swap" in key for module in cross_attentions(model).values() for part in module.modules() for key in vars(part)
    )


def encoder_decoder(decoder_family: str) -> EncoderDecoderModel:
    """Return a small encoder-decoder around a BERT encoder."""
    decoder = build(decoder_family, add_cross_attention=True)
    model = EncoderDecoderModel(encoder=build("bert").bert, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model.eval()


@pytest.mark.parametrize("decoder_family", DECODERS)
@pytest.mark.parametrize("scheme", ["rope", "alibi", "t5", "concat"])
def test_a_swapped_encoder_decoder_generates(decoder_family: str, scheme: str) -> None:
    model = encoder_decoder(decoder_family)
    source = token_ids(2, LONGER)
    for part in (model.encoder, model.decoder):
        pe_swap.swap_positional(part, scheme)
        disturb(part)
    settings = {
        "max_new_tokens": LONGER,
        "min_new_tokens": LONGER,
        "do_sample": False,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    cached = model.generate(source, **settings)
    assert cached.shape == (2, LONGER + 1)
    assert torch.equal(model.generate(source, **settings, use_cache=False), cached)
    assert torch.equal(
        model.generate(source, **settings, num_beams=2), model.generate(source, **settings, num_beams=2, use_cache=False)
    )
    for part in (model.encoder, model.decoder):
        pe_swap.restore_positional(part)
    fresh = encoder_decoder(decoder_family)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_swapped_part_whose_whole_does_not_know_is_not_loaded_with_a_random_table(tmp_path: Path) -> None:
    """A tool may take the state first, and then transformers does not take it from the modules, which would refuse."""
    whole = encoder_decoder("gpt2")
    pe_swap.swap_positional(whole.encoder, "t5")
    with pytest.raises(pe_swap.errors.SwapStateError, match="holds a BertModel that was swapped by itself"):
        whole.save_pretrained(tmp_path / "whole")
    whole.save_pretrained(tmp_path / "whole", state_dict=whole.state_dict())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        EncoderDecoderModel.from_pretrained(tmp_path / "whole")
    head = build("gpt2")
    pe_swap.swap_positional(head.transformer, "rope")
    head.save_pretrained(tmp_path / "head", state_dict=head.state_dict())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "head")
    with pytest.raises(RuntimeError, match=r"size mismatch for transformer.wpe.weight"):
        build("gpt2").load_state_dict(head.state_dict())


def test_a_decoder_looks_back_only_and_an_encoder_both_ways() -> None:
    """The same BERT weights: `is_decoder` alone tells the scheme which form it takes."""
    encoder, decoder = build("bert").bert, build("bert-decoder")
    decoder.bert.load_state_dict(encoder.state_dict(), strict=False)
    for model in (encoder, decoder):
        pe_swap.swap_positional(model, "t5", num_buckets=8, max_distance=12)
    assert holder_of(encoder).scheme_at(0).geometry.is_causal is False
    assert holder_of(decoder).scheme_at(0).geometry.is_causal is True
    ids = token_ids(1, 12)
    changed = ids.clone()
    changed[:, 8:] = token_ids(1, 4, seed=4)
    with torch.no_grad():
        assert (encoder(ids)[0][:, :8] - encoder(changed)[0][:, :8]).abs().max() > 1e-4
        torch.testing.assert_close(decoder(ids).logits[:, :8], decoder(changed).logits[:, :8], **ROUNDING)
