"""Every bad input to a swap or a restore: the error's text, and a model that is bit for bit as it was."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    XGLMConfig,
    XGLMForCausalLM,
)

import pe_swap
from pe_swap import errors
from pe_swap.patching.layer_cache import cache_argument
from pe_swap.schemes import SCHEMES, Scheme, SchemeOptions
from tests.support.families import tiny
from tests.support.models import CASES, build, swapped, token_ids, with_cache

SCHEME_LIST = ", ".join(pe_swap.list_schemes())
FAMILY_LIST = ", ".join(pe_swap.list_families())
HUGE = 2**24


def logits(model: nn.Module) -> Tensor:
    """Return the logits of a fixed batch."""
    with torch.no_grad():
        return model(token_ids(2, 9)).logits


@contextmanager
def unchanged(model: nn.Module, probe: Callable[[nn.Module], Tensor] | None = logits) -> Iterator[None]:
    """Assert that the block leaves every module, tensor, hook, attribute and configuration of `model` as they were.

    Args:
        model: any module.
        probe: what the model computes, compared bit for bit; None for a model that cannot run.
    """
    before, tensors, output = _shape_of(model), _tensors_of(model), None if probe is None else probe(model)
    yield
    after = _shape_of(model)
    for part, value in before.items():
        assert after[part] == value, part
    found = model.state_dict(keep_vars=True)
    assert list(found) == list(tensors)
    for name, (identity, value) in tensors.items():
        assert id(found[name]) == identity, f"{name} is another tensor"
        assert torch.equal(found[name], value), f"{name} has other values"
    if probe is not None:
        assert torch.equal(probe(model), output)


def _tensors_of(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def _shape_of(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model but its tensors' values."""
    modules = dict(model.named_modules())
    configs = {name: module.config for name, module in modules.items() if hasattr(module, "config")}
    return {
        "modules": {name: (id(module), type(module), module.training) for name, module in modules.items()},
        "attributes": {name: set(vars(module)) for name, module in modules.items()},
        "hooks": {name: [*module._forward_pre_hooks.items(), *module._forward_hooks.items()] for name, module in modules.items()},
        "configs": {name: (id(config), type(config), config.to_dict()) for name, config in configs.items()},
        "implementations": {name: config._attn_implementation for name, config in configs.items()},
    }


FACT = re.compile(r"'[^']+'|\b[A-Z]\w*[A-Z]\w*\b|\b\d[\d,.]*\d\b|\b\d\b|\b\w+\.\w[\w.]*\b|\b\w+_\w+\b")
"""What a message says beside its words: quoted names and values, classes, numbers, paths, names with an underscore."""

LONGEST_MESSAGE = 520
"""Characters: two sentences, and a list of names from a registry where there is one."""


def refused(kind: type[Exception], text: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Assert that a call raises `kind`, one of ours, in sentences with every fact of `text`; its words may be others."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, errors.PESwapError)
    said = str(caught.value)
    missing = [fact for fact in FACT.findall(text) if fact not in said]
    assert not missing, f"{missing} not in: {said}"
    assert said.endswith((".", "?"))
    assert "must be" in said or re.search(r"[.?](?= [A-Z])", said), f"neither a rule nor a way out in: {said}"
    assert len(re.sub(r"\w+(, \w+){5,}", "", said)) <= LONGEST_MESSAGE, said


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.transformer.wte.weight.data.view(-1)[0].add_(1.0),
        lambda model: setattr(model.transformer.wpe, "weight", nn.Parameter(model.transformer.wpe.weight.data.clone())),
        lambda model: model.transformer.h[1].attn.register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model.transformer.h[0].attn, "left_over", 1),
        lambda model: setattr(model.config, "n_positions", 33),
        lambda model: setattr(model.config, "_attn_implementation", "eager"),
        lambda model: pe_swap.swap_positional(model, "rope"),
        lambda model: model.train(),
    ],
)
def test_the_comparison_sees_a_change(change: Callable[[Any], Any]) -> None:
    model = build("gpt2")
    with pytest.raises(AssertionError), unchanged(model):
        change(model)


# --- schemes and their options -------------------------------------------------------------------------------------------------

BAD_SCHEMES: list[tuple[Any, type[Exception], str]] = [
    ("ropee", errors.UnknownNameError, f"Unknown positional scheme 'ropee'. Did you mean 'rope'? Available: {SCHEME_LIST}."),
    ("Alibi", errors.UnknownNameError, f"Unknown positional scheme 'Alibi'. Did you mean 'alibi'? Available: {SCHEME_LIST}."),
    ("", errors.UnknownNameError, f"Unknown positional scheme ''. Available: {SCHEME_LIST}."),
    *(
        (
            value,
            errors.OptionError,
            f"scheme is {value!r}; it must be a name ({SCHEME_LIST}), the options of a scheme (AlibiOptions(...)), or a scheme.",
        )
        for value in (None, 3, ["rope"], SCHEMES["rope"])
    ),
]


@pytest.mark.parametrize(("scheme", "kind", "text"), BAD_SCHEMES, ids=lambda value: repr(value)[:20])
def test_unknown_schemes(scheme: Any, kind: type[Exception], text: str) -> None:
    model = build("gpt2")
    with unchanged(model):
        refused(kind, text, pe_swap.swap_positional, model, scheme)


BAD_OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    (
        "hope",
        {"bsae": 1e4},
        "hope: unknown option 'bsae'. Did you mean 'base'?",
    ),
    ("hope", {"zzz": 1}, "hope: unknown option 'zzz'. Options: longest_period, base, layout, logit_scale."),
    ("none", {"base": 1e4}, "none: unknown option 'base'. Options: temperature, temperature_coefficient, qk_norm, logit_scale."),
    *(
        ("rope", {"base": value}, f"rope: option 'base' is {value!r}; it must be a number above 1 and at most 1e+12.")
        for value in ("10000", True, float("nan"), float("inf"), 0, 1.0, -10000, [1e4])
    ),
    (
        "rope",
        {"layout": "halff"},
        "rope: option 'layout' is 'halff'; it must be one of 'half', 'interleaved'. Did you mean 'half'?",
    ),
    ("rope", {"fraction": 0}, "rope: option 'fraction' is 0; it must be a number above 0 and at most 1."),
    ("rope", {"fraction": 1.5}, "rope: option 'fraction' is 1.5; it must be a number above 0 and at most 1."),
    (
        "alibi",
        {"slopes": "geometrical"},
        "alibi: option 'slopes' is 'geometrical'; it must be one of 'press', 'geometric'. Did you mean 'geometric'?",
    ),
    ("alibi", {"trainable": 1}, "alibi: option 'trainable' is 1; it must be True or False."),
    *(
        (
            "learned",
            {"max_length": value},
            f"learned: option 'max_length' is {value!r}; it must be an integer from 1 to {HUGE:,}, or None (the trained length).",
        )
        for value in (0, -5, 64.0, "64", True, HUGE + 1)
    ),
    (
        "learned",
        {"extend": "intrepolate"},
        "learned: option 'extend' is 'intrepolate'; it must be one of 'interpolate', 'tile', 'group', 'mean'. Did you mean "
        "'interpolate'?",
    ),
    *(
        ("shaw", {"max_distance": value}, f"shaw: option 'max_distance' is {value!r}; it must be an integer from 1 to 65,536.")
        for value in (0, -3, 4.0)
    ),
    ("shaw", {"value": "yes"}, "shaw: option 'value' is 'yes'; it must be True or False."),
    (
        "t5",
        {"num_buckets": 7},
        "t5: option 'num_buckets' is 7; it must be even: half of the buckets hold one distance each, half are logarithmic.",
    ),
    ("t5", {"num_buckets": 0}, "t5: option 'num_buckets' is 0; it must be an integer from 4 to 65,536."),
    ("t5", {"max_distance": -1}, f"t5: option 'max_distance' is -1; it must be an integer from 2 to {HUGE:,}."),
    (
        "concat",
        {"dim": 0},
        "concat: option 'dim' is 0; it must be an integer from 1 to 65,536, or None (the hidden size).",
    ),
    (
        "concat",
        {"table": "sinusoid"},
        "concat: option 'table' is 'sinusoid'; it must be one of 'sinusoidal', 'learned'. Did you mean 'sinusoidal'?",
    ),
    (
        "sinusoidal",
        {"scale": 0},
        "sinusoidal: option 'scale' is 0; it must be a number above 0 and at most 1e+06, or 'match'.",
    ),
]


@pytest.mark.parametrize(("scheme", "options", "text"), BAD_OPTIONS, ids=[f"{name}-{given}" for name, given, _ in BAD_OPTIONS])
def test_unknown_and_mistyped_options(scheme: str, options: dict[str, Any], text: str) -> None:
    model = build("gpt2")
    with unchanged(model):
        refused(errors.OptionError, text, pe_swap.swap_positional, model, scheme, **options)


def test_options_beside_an_object_that_holds_its_own() -> None:
    model = build("bert")
    with unchanged(model):
        refused(
            errors.OptionError,
            "rope: options ['base'] were given beside an object that holds its own. Put them into the object.",
            pe_swap.swap_positional,
            model,
            SCHEMES["rope"].Options(),
            base=500.0,
        )


@pytest.mark.parametrize(
    ("width", "head_dim", "fraction", "shown"), [(96, 8, 0.375, "3"), (36, 3, 1.0, "3"), (96, 8, 0.3, "2.4")]
)
def test_an_odd_rotary_dimension(width: int, head_dim: int, fraction: float, shown: str) -> None:
    model = build("gpt2", n_embd=width)
    with unchanged(model), pytest.raises(errors.OptionError) as caught:
        pe_swap.swap_positional(model, "rope", fraction=fraction)
    message = str(caught.value)
    assert message.startswith(f"rope: head_dim {head_dim} x fraction {fraction} gives {shown} rotary dimensions; they must be ")
    assert "Choose another fraction" in message


# --- what is not a model that can be swapped -----------------------------------------------------------------------------------


def _xglm() -> PreTrainedModel:
    return XGLMForCausalLM(XGLMConfig(vocab_size=89, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2)).eval()


def _mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=89, hidden_size=16, num_hidden_layers=1)).eval()


@pytest.mark.parametrize("call", [pe_swap.swap_positional, pe_swap.restore_positional], ids=["swap", "restore"])
@pytest.mark.parametrize(("make", "family", "probe"), [(_xglm, "xglm", logits), (_mamba, "mamba", logits)], ids=["xglm", "mamba"])
def test_a_family_without_an_adapter(call: Callable[..., Any], make: Callable[[], Any], family: str, probe: Any) -> None:
    model = make()
    arguments = (model, "rope") if call is pe_swap.swap_positional else (model,)
    with unchanged(model, probe):
        refused(
            errors.UnsupportedModelError,
            f"'{family}' ({type(model).__name__}), pe_swap/families",
            call,
            *arguments,
        )


@pytest.mark.parametrize("call", [pe_swap.swap_positional, pe_swap.restore_positional], ids=["swap", "restore"])
def test_a_wrapper_around_a_model(call: Callable[..., Any]) -> None:
    wrapper = nn.DataParallel(build("gpt2"))
    arguments = (wrapper, "rope") if call is pe_swap.swap_positional else (wrapper,)
    with unchanged(wrapper):
        refused(
            errors.UnsupportedModelError,
            "PreTrainedModel: torch.nn.parallel.data_parallel.DataParallel",
            call,
            *arguments,
        )


@pytest.mark.parametrize(("thing", "shown"), [("gpt2", "builtins.str"), (None, "builtins.NoneType")])
def test_what_is_no_model_at_all(thing: Any, shown: str) -> None:
    refused(
        errors.UnsupportedModelError,
        f"pe_swap patches transformers models (PreTrainedModel), got {shown}. Load one first, for instance with "
        "AutoModelForCausalLM.from_pretrained(...).",
        pe_swap.swap_positional,
        thing,
        "rope",
    )


# --- a model in another state than a swap expects ------------------------------------------------------------------------------


def test_a_position_table_that_something_else_has_patched() -> None:
    model = build("gpt2")
    table = model.transformer.wpe
    model.transformer.wpe = nn.Sequential(table)
    with unchanged(model):
        refused(
            errors.FamilyError,
            "GPT2Model.wpe is a Sequential, where an nn.Embedding was expected: something else has patched this model. Undo that "
            "patch before the swap.",
            pe_swap.swap_positional,
            model,
            "rope",
        )


def test_a_token_table_that_something_else_has_patched() -> None:
    model = build("bert")
    model.bert.embeddings.word_embeddings = nn.Sequential(model.bert.embeddings.word_embeddings)
    with unchanged(model):
        refused(
            errors.FamilyError,
            "BertModel.embeddings.word_embeddings is a Sequential, which has no 'weight' whose dtype positions could take: something "
            "else has patched this model. Undo that patch before the swap.",
            pe_swap.swap_positional,
            model,
            "rope",
        )


def test_fewer_layers_than_the_configuration_says() -> None:
    model = build("gpt2")
    del model.transformer.h[1]
    with unchanged(model):
        refused(
            errors.FamilyError,
            "GPT2Model has 1 layers, and its configuration says 2 (num_hidden_layers).",
            pe_swap.swap_positional,
            model,
            "rope",
        )


def test_more_layers_than_the_configuration_says() -> None:
    model = build("bert")
    model.config.num_hidden_layers = 1
    with unchanged(model):
        refused(
            errors.FamilyError,
            "BertModel has 2 layers, but its configuration says 1 (num_hidden_layers). Set the field to the true number before the "
            "swap.",
            pe_swap.swap_positional,
            model,
            "alibi",
        )


@pytest.mark.parametrize(
    ("path", "name"),
    [("transformer.h.1.attn", "GPT2Attention"), ("transformer", "GPT2Model")],
)
def test_a_cache_by_a_name_that_nobody_knows(path: str, name: str) -> None:
    model = build("gpt2")
    model.get_submodule(path).forward = lambda hidden_states, kv_store=None: hidden_states
    with unchanged(model, probe=None):
        known = "'cache', 'past_key_values', 'layer_past'"
        refused(
            errors.FamilyError,
            f"{name}.forward takes none of {known}, by which pe_swap finds the cache of a call; it takes hidden_states, kv_store. "
            "Nothing was patched. This transformers version may have renamed it: update pe_swap, or use a version it was tested with.",
            pe_swap.swap_positional,
            model,
            "rope",
        )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder: Path = tmp_path_factory.mktemp("swapped")
    swapped("gpt2", "alibi").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_restoring_a_model_that_was_loaded_swapped(loaded: PreTrainedModel) -> None:
    with unchanged(loaded):
        refused(
            errors.SwapStateError,
            "This PESwapGPT2LMHeadModel was loaded already swapped; its own position table is not in the checkpoint. Load the model it "
            "was made from instead, or swap it to another scheme.",
            pe_swap.restore_positional,
            loaded,
        )


@pytest.mark.parametrize("scheme", ["sinusoidal", "index", "binary"])
def test_matching_the_table_of_a_model_that_was_loaded_swapped(loaded: PreTrainedModel, scheme: str) -> None:
    with unchanged(loaded):
        refused(
            errors.OptionError,
            f"{scheme}: option 'scale' is 'match', but this model was loaded already swapped and has no table left to match. Give a "
            "number, or swap the model it was made from.",
            pe_swap.swap_positional,
            loaded,
            scheme,
        )


@pytest.mark.parametrize("scheme", ["learned", "concat"])
def test_starting_from_the_table_of_a_model_that_was_loaded_swapped(loaded: PreTrainedModel, scheme: str) -> None:
    with unchanged(loaded):
        refused(
            errors.SwapStateError,
            f"The scheme '{scheme}' starts from the model's own position table, but this model was loaded already swapped and has none "
            "left. Swap the model it was made from, or choose a scheme that needs no table.",
            pe_swap.swap_positional,
            loaded,
            scheme,
        )


OUTER_TEXT = (
    "This GPT2LMHeadModel holds a GPT2Model that was swapped by itself, and its own configuration does not say so: saved, it would "
    "come back with random positions. Call restore_positional on the GPT2Model, then swap the GPT2LMHeadModel."
)


@pytest.mark.parametrize("call", [pe_swap.swap_positional, pe_swap.restore_positional], ids=["swap", "restore"])
def test_a_head_around_a_base_model_swapped_by_itself(call: Callable[..., Any]) -> None:
    model = build("gpt2")
    pe_swap.swap_positional(model.transformer, "rope")
    arguments = (model, "alibi") if call is pe_swap.swap_positional else (model,)
    with unchanged(model):
        refused(errors.SwapStateError, OUTER_TEXT, call, *arguments)


SAVED_TEXT = (
    "This LlamaForCausalLM holds a LlamaModel that was swapped by itself, and its own configuration does not say so: the folder would be "
    "read without the schemes. Call restore_positional on the LlamaModel, then swap the LlamaForCausalLM; or save the LlamaModel alone."
)


@pytest.mark.parametrize(
    "options", [("alibi", {}), ("rope", {"rope_type": "yarn", "factor": 2.0})], ids=["alibi", "plain folder"]
)
def test_a_head_is_not_saved_around_a_base_model_swapped_by_itself(options: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    model = tiny("llama")
    before = model.state_dict().keys()
    pe_swap.swap_positional(model.model, options[0], **options[1])
    refused(errors.SwapStateError, SAVED_TEXT, model.save_pretrained, tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "part")
    assert model.state_dict().keys() == before, "to take the state alone is no loss"

    class Own(type(model)):  # type: ignore[misc]  # swaps its part whenever it is built
        pass

    Own.__module__ = "elsewhere"
    model.__class__ = Own
    model.save_pretrained(tmp_path / "own")


PATCHED_TEXT = (
    "The configuration of this GPT2LMHeadModel says that it is swapped, but GPT2Model.wpe is a Embedding: something else has "
    "replaced the module that holds its schemes. Undo that before a swap or a restore."
)


@pytest.mark.parametrize("call", [pe_swap.swap_positional, pe_swap.restore_positional], ids=["swap", "restore"])
def test_a_swapped_model_whose_schemes_something_else_replaced(call: Callable[..., Any]) -> None:
    model = swapped("gpt2", "rope")
    model.transformer.wpe = nn.Embedding(64, 96)
    arguments = (model, "alibi") if call is pe_swap.swap_positional else (model,)
    with unchanged(model, probe=None):
        refused(errors.SwapStateError, PATCHED_TEXT, call, *arguments)
    with pytest.raises(
        errors.SwapStateError, match=r"GPT2Model\.wpe is a Embedding, where the schemes of this swapped model were"
    ):
        model(torch.ones(1, 4, dtype=torch.long))


# --- backends ------------------------------------------------------------------------------------------------------------------

UNABLE = [
    ("flex_attention", "shaw", "score_bias", "'eager', 'sdpa'"),
    ("flex_attention", "fox", "score_bias", "'eager', 'sdpa'"),
    ("flash_attention_2", "shaw", "score_bias", "'eager', 'sdpa'"),
    ("flash_attention_2", "alibi", "relative_bias", "'eager', 'sdpa', 'flex_attention'"),
    ("flash_attention_2", "t5", "relative_bias", "'eager', 'sdpa', 'flex_attention'"),
]
"""Implementation, scheme, the hook that it lacks, and what has it."""


def backend_text(implementation: str, hooks: str, able: str) -> str:
    return (
        f"The attention implementation is '{implementation}', but the scheme adds to the scores inside attention ({hooks}); it must "
        f'be one of {able}. Call model.set_attn_implementation("sdpa").'
    )


@pytest.mark.parametrize(("implementation", "scheme", "hook", "able"), UNABLE)
def test_a_backend_that_takes_no_such_bias(implementation: str, scheme: str, hook: str, able: str) -> None:
    model = build("gpt2")
    model.config._attn_implementation_internal = implementation  # its own setter would look for the package
    text = backend_text(implementation, hook, able)
    with unchanged(model, probe=None):
        refused(errors.UnsupportedBackendError, text, pe_swap.swap_positional, model, scheme)


def test_a_backend_that_takes_no_such_bias_in_one_of_the_layers() -> None:
    model = pe_swap.swap_positional(build("bert", "flex_attention"), "rope")
    text = backend_text("flex_attention", "score_bias", "'eager', 'sdpa'")
    with unchanged(model, probe=None):
        refused(errors.UnsupportedBackendError, text, pe_swap.swap_positional, model, "shaw", layers=[1])


@pytest.mark.parametrize("case", ["shaw", "deberta"])
def test_a_backend_that_takes_no_such_bias_set_later(case: str) -> None:
    model = swapped("bert", case)
    text = backend_text("flex_attention", "score_bias", "'eager', 'sdpa'")
    with unchanged(model):
        refused(errors.UnsupportedBackendError, text, model.set_attn_implementation, "flex_attention")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_backend_that_takes_no_such_bias_written_into_the_configuration(family: str) -> None:
    model = swapped(family, "shaw")
    text = backend_text("flex_attention", "score_bias", "'eager', 'sdpa'")
    with unchanged(model):
        refused(errors.UnsupportedBackendError, text, setattr, model.config, "_attn_implementation", "flex_attention")


def test_a_backend_unknown_to_pe_swap() -> None:
    model = build("gpt2")
    model.config._attn_implementation_internal = "paged|sdpa"
    with unchanged(model, probe=None):
        refused(
            errors.UnsupportedBackendError,
            "The attention implementation is 'paged|sdpa', but the scheme transforms queries and keys inside attention; it must be one of "
            "'eager', 'sdpa', 'flex_attention', 'flash_attention_2', 'flash_attention_3', 'flash_attention_4'. Call "
            'model.set_attn_implementation("sdpa").',
            pe_swap.swap_positional,
            model,
            "rope",
        )


@pytest.mark.parametrize("family", ["gpt2", "bert", "bert-decoder"])
@pytest.mark.parametrize("case", ["rope", "alibi"])
def test_a_backend_changed_behind_the_back_of_a_swapped_model(family: str, case: str) -> None:
    model = swapped(family, case)
    vars(model.config)["_attn_implementation_internal"] = "eager"
    with unchanged(model, probe=None):
        refused(
            errors.UnsupportedBackendError,
            f"Layer 0 carries the scheme '{case}', but its attention implementation is 'eager', which knows nothing of it and would "
            "drop it. Set implementations with model.set_attn_implementation(...).",
            model,
            token_ids(1, 5),
        )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["rope", "alibi"])
def test_an_attention_forward_called_around_its_hooks(backend: str, case: str) -> None:
    model = swapped("gpt2", case, backend)
    with unchanged(model):
        refused(
            errors.UnsupportedBackendError,
            f"Layer 1 carries the scheme '{case}', but its attention was called without the keyword argument 'attention_call'. Call the "
            "attention module, not its forward, so that its hooks run.",
            model.transformer.h[1].attn.forward,
            torch.zeros(1, 3, 96),
        )


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["rope", "alibi", "shaw"])
def test_a_cache_that_reaches_attention_around_the_hook(backend: str, case: str) -> None:
    model = swapped("gpt2", case, backend)
    attention, known = model.transformer.h[1].attn, cache_argument(model)
    hidden: dict[str, Any] = {}

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden["cache"] = kwargs.pop(known, None)
        return args, kwargs

    def bring_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, known: hidden["cache"]}

    attention.register_forward_pre_hook(hide, with_kwargs=True, prepend=True)
    attention.register_forward_pre_hook(bring_back, with_kwargs=True)
    cache = DynamicCache(config=model.config)
    model(token_ids(1, 5), **with_cache(model, cache))
    refused(
        errors.UnsupportedBackendError,
        f"Layer 1 carries the scheme '{case}' and has 6 keys with 1 queries, but its hook was handed no cache as '{known}': the "
        "positions would be wrong. This transformers version may hand caches on in another way: use a version that pe_swap was tested "
        "with, or use_cache=False.",
        model,
        token_ids(1, 1),
        **with_cache(model, cache),
    )


# --- layers --------------------------------------------------------------------------------------------------------------------

NOT_LAYERS = "it must be a non-empty list of layer indices (integers), or None for every layer."


@pytest.mark.parametrize("is_swapped", [False, True], ids=["plain", "swapped"])
@pytest.mark.parametrize(
    ("layers", "text"),
    [
        *(
            (layers, f"layers is {layers!r}; {NOT_LAYERS}")
            for layers in ([], 1, "01", [True], [0.5], [0, None], range(0), {0: "fox"})
        ),
        *(
            (layers, f"layers names layer {wrong}, but the model has 2; it must be from 0 to 1 (or -2 to -1, from the end).")
            for layers, wrong in (([2], 2), ([0, -3], -3), (range(5), 2))
        ),
    ],
    ids=repr,
)
def test_bad_layers(layers: Any, text: str, is_swapped: bool) -> None:
    model = swapped("gpt2", "t5") if is_swapped else build("gpt2")
    with unchanged(model):
        refused(errors.LayerError, text, pe_swap.swap_positional, model, "rope", layers=layers)


@pytest.mark.parametrize("scheme", sorted({name for name in ("binary", "concat", "index", "learned", "sinusoidal")}))
def test_layers_for_a_scheme_that_acts_on_the_input(scheme: str) -> None:
    model = build("gpt2")
    with unchanged(model):
        refused(
            errors.LayerError,
            f"layers is [0], but the scheme '{scheme}' acts on the input embeddings, which all layers share. Swap it without layers; "
            "then give some layers a scheme that acts inside attention (rope, alibi, t5, shaw, none).",
            pe_swap.swap_positional,
            model,
            scheme,
            layers=[0],
        )


# --- encoders ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BackwardOptions(SchemeOptions):
    """No options."""

    scheme: ClassVar[str] = "backward"


class Backward(Scheme):
    """A stand-in for a scheme that looks back only."""

    Options = BackwardOptions
    summary = "looks back only"
    causal_only = True

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        return distance.clamp(max=0).float().expand(self.geometry.num_heads, -1)


def test_a_causal_scheme_in_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES._entries, "backward", Backward)
    encoder = build("bert")
    with unchanged(encoder):
        refused(
            errors.UnsupportedModelError,
            "The scheme 'backward' is defined for causal attention only, and this model is an encoder. Use a scheme with a two-sided "
            "form (alibi, t5, rope, shaw), or a decoder.",
            pe_swap.swap_positional,
            encoder,
            "backward",
        )
    for family in ("gpt2", "bert-decoder"):
        model = build(family)
        before = logits(model)
        assert not torch.equal(logits(pe_swap.swap_positional(model, "backward")), before)


def test_no_order_where_warnings_are_errors() -> None:
    model = build("bert")
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"^The scheme 'none' on an encoder leaves no order of tokens"):
            pe_swap.swap_positional(model, "none")


def test_no_order_is_said_of_every_such_swap_and_of_no_other(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no order of tokens"):
        first = pe_swap.swap_positional(build("bert"), "none")
    pe_swap.swap_positional(first, "rope").save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no order of tokens"):
        pe_swap.swap_positional(loaded, "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pe_swap.swap_positional(loaded, "alibi", layers=[0])
        pe_swap.swap_positional(pe_swap.swap_positional(build("bert"), "rope"), "none", layers=[1])
        pe_swap.swap_positional(build("gpt2"), "none")


# --- a swap that fails for a reason nobody foresaw -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("before", [None, "rope", "alibi-trained", "sinusoidal"])
@pytest.mark.parametrize("method", ["__init__", "start_from"])
def test_a_scheme_that_fails_while_it_is_built(family: str, before: str | None, method: str, monkeypatch: Any) -> None:
    model = build(family) if before is None else swapped(family, before)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(SCHEMES["learned"], method, fail)
    with unchanged(model), pytest.raises(MemoryError, match="no room"):
        pe_swap.swap_positional(model, "learned", max_length=64)


@pytest.mark.parametrize("case", CASES)
def test_a_refused_swap_can_still_be_restored(case: str) -> None:
    model = build("gpt2")
    before = logits(model)
    name, options = CASES[case]
    pe_swap.swap_positional(model, name, **options)
    with pytest.raises(errors.OptionError):
        pe_swap.swap_positional(model, "rope", fraction=0.375)
    pe_swap.restore_positional(model)
    assert torch.equal(logits(model), before)


def test_two_names_for_one_model_share_the_refusal() -> None:
    """A model of the family under a class of somebody else's is a model of the family."""

    class Mine(BertForMaskedLM):
        """A caller's own subclass."""

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 89}
    model = Mine(BertConfig(max_position_embeddings=32, **sizes)).eval()
    before = logits(model)
    pe_swap.swap_positional(model, "rope")
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(pe_swap.restore_positional(model)), before)
