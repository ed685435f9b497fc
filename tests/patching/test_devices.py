"""Models that tools have spread over devices, or whose weights they keep elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import send_to_device
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

import pe_swap
from pe_swap import swap
from pe_swap.errors import SwapStateError
from pe_swap.patching.devices import on_device
from pe_swap.patching.install import holder_of
from pe_swap.schemes.base import ATTENTION_HOOKS
from tests.support.families import auto_class, is_causal, tiny
from tests.support.models import CASES, build, swapped, token_ids

FIRST, SECOND = torch.device("cpu"), torch.device("meta")
"""Two devices that any machine has. FakeTensorMode refuses operations that mix them, as CUDA would."""


def read_by_layers(case: str) -> bool:
    """Tell whether a case has weights that act inside attention."""
    scheme = holder_of(swapped("gpt2", case)).scheme_at(0)
    return bool(scheme.hooks & ATTENTION_HOOKS) and next(scheme.parameters(), None) is not None


PARAMETRIC = [case for case in CASES if read_by_layers(case)]

REST = {
    "gpt2": ["transformer.h", "transformer.wte", "transformer.drop", "transformer.ln_f", "lm_head"],
    "bert": ["bert.encoder", "cls", *(f"bert.embeddings.{name}" for name in ("word_embeddings", "token_type_embeddings"))]
    + [f"bert.embeddings.{name}" for name in ("LayerNorm", "dropout")],
}
TABLE = {"gpt2": "transformer.wpe", "bert": "bert.embeddings.position_embeddings"}


@pytest.mark.parametrize("layers", ["cpu", "disk"])
@pytest.mark.parametrize("case", ["learned", "concat", "t5", "alibi-trained", "shaw-all", "fire", "fox", "deberta", "rope"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_weights_kept_on_disk_are_read_all_the_same(family: str, case: str, layers: str, tmp_path: Path) -> None:
    if case == "fox" and not is_causal(family):
        case = "deberta-log"
    model, ids = swapped(family, case), token_ids(2, 20)
    model.save_pretrained(tmp_path / "model")
    placed = {**dict.fromkeys(REST[family], "cpu"), REST[family][0]: layers, TABLE[family]: "disk"}
    loaded = auto_class(family).from_pretrained(tmp_path / "model", device_map=placed, offload_folder=tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in loaded.parameters()) or (case, layers) == ("rope", "cpu")
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(loaded(ids).logits, expected)
    assert not any(parameter.is_meta for parameter in holder_of(loaded).parameters())


@pytest.mark.parametrize("case", ["t5", "shaw-all", "fox"])
def test_a_rotary_model_offloaded_as_a_whole(case: str, tmp_path: Path) -> None:
    """The holder has no tensor of its own here, so that accelerate leaves no mark on it."""
    model, ids = swapped("llama", case), token_ids(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        disk_offload(model, tmp_path)
        assert any(parameter.is_meta for parameter in holder_of(model).parameters())
        assert torch.equal(model(ids).logits, expected)


def test_a_model_whose_token_embeddings_are_on_disk_is_swapped_and_swapped_on_after_a_load(tmp_path: Path) -> None:
    ids, model = token_ids(2, 20), build("llama")
    placed = {"model.embed_tokens": "disk", **dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")}
    for step, scheme in enumerate(("t5", "rope")):  # the second on what the first has saved
        model.save_pretrained(folder := tmp_path / str(step))
        loaded = auto_class("llama").from_pretrained(folder, device_map=placed, offload_folder=tmp_path / f"offloaded {step}")
        assert loaded.get_input_embeddings().weight.is_meta
        with torch.no_grad():
            found, expected = (pe_swap.swap_positional(each, scheme)(ids).logits for each in (loaded, model))
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("family", "scheme"), [("gpt2", "learned"), ("gpt2", "rope"), ("t5", "t5"), ("llama", "sinusoidal")])
def test_a_model_offloaded_as_a_whole_is_swapped_and_restored(family: str, scheme: str) -> None:
    """The first reads a table that is kept elsewhere, the second its mean, the others a bias and the sizes of token embeddings."""
    model, offloaded, ids = build(family), build(family), token_ids(2, 20)
    given = {"input_ids": ids, "decoder_input_ids": ids} if family == "t5" else {"input_ids": ids}
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with torch.no_grad():
        own = model(**given).logits
        found, expected = (pe_swap.swap_positional(each, scheme)(**given).logits for each in (offloaded, model))
        assert torch.equal(found, expected)
        assert torch.equal(pe_swap.restore_positional(offloaded)(**given).logits, own)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def test_a_table_without_numbers_beside_a_model_that_has_them_is_refused() -> None:
    model = build("gpt2")
    model.transformer.wpe.to("meta")
    with pytest.raises(SwapStateError, match="on the device 'meta'"):
        pe_swap.swap_positional(model, "alibi")


@pytest.mark.parametrize("case", ["learned", "concat", "sinusoidal", "index"])
def test_a_scheme_that_starts_from_a_table_needs_its_numbers(case: str) -> None:
    model = build("gpt2").to("meta")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(SwapStateError, match=r"on the device 'meta'.*after the weights are loaded"):
        pe_swap.swap_positional(model, case, **({"max_length": 64} if case == "learned" else {}))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert pe_swap.swap_positional(model, "rope").config.pe_swap


def spread(model: PreTrainedModel, mode: FakeTensorMode) -> PreTrainedModel:
    """Move layer 1 to a second device and the rest to a first one: tensors without numbers, which know their device."""
    for path, module in model.named_modules():
        device = SECOND if f".{path}.".startswith((".h.1.", ".ln_f.")) else FIRST
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                with mode:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    tensors[name] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved

    def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return send_to_device(args, SECOND), send_to_device(kwargs, SECOND)

    model.h[1].register_forward_pre_hook(move, with_kwargs=True)  # what accelerate does where a model goes on elsewhere
    return model


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", PARAMETRIC)
def test_layers_on_another_device_than_the_positional_weights(case: str, backend: str) -> None:
    mode = FakeTensorMode()
    model = spread(swapped("gpt2", case, backend).transformer, mode)
    with mode:
        states = model(torch.zeros(2, 20, dtype=torch.long, device=FIRST), use_cache=False).last_hidden_state
    assert (states.device, states.shape) == (SECOND, (2, 20, 96))


@pytest.mark.parametrize("case", ["t5", "fire", "deberta-log", "none-norm"])
def test_a_stand_in_has_every_weight_and_passes_gradients_on(case: str) -> None:
    scheme = holder_of(swapped("gpt2", case)).scheme_at(0)
    assert on_device(scheme, torch.device("cpu")) is scheme
    stand_in = on_device(scheme, torch.device("meta"))
    assert {weight.device.type for weight in scheme.parameters()} == {"cpu"}
    assert stand_in.options is scheme.options
    names = [name for name, _ in scheme.named_parameters()]
    for name in names:
        owner, _, attribute = name.rpartition(".")
        copied = getattr(stand_in.get_submodule(owner), attribute)
        assert copied.device.type == "meta"
        assert copied.grad_fn is not None


def test_a_scheme_without_weights_is_itself_anywhere() -> None:
    scheme = holder_of(swapped("gpt2", "rope")).scheme_at(0)
    assert on_device(scheme, torch.device("meta")) is scheme


def test_an_unswapped_model_spreads_the_same_way() -> None:
    mode = FakeTensorMode()
    model = spread(build("gpt2").transformer, mode)
    with mode:
        states = model(torch.zeros(2, 20, dtype=torch.long, device=FIRST), use_cache=False).last_hidden_state
    assert states.device == SECOND


def test_no_scheme_computes_on_the_default_device() -> None:
    ids = token_ids(2, 10)
    for case in CASES:
        model = swapped("gpt2", case).eval()
        with torch.no_grad():
            expected = model(ids).logits
            with SECOND:
                found = model(ids).logits
        assert torch.equal(found, expected), case


def test_the_vocabulary_is_read_for_a_vector_on_the_input_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large model it is gigabytes."""
    read: list[object] = []
    original = swap.token_size
    monkeypatch.setattr(swap, "token_size", lambda tokens: read.append(tokens) or original(tokens))
    pe_swap.swap_positional(tiny("llama"), "alibi")
    assert not read
    pe_swap.swap_positional(tiny("llama"), "sinusoidal")
    assert len(read) == 1
