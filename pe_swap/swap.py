"""Swapping a model's positions, and putting them back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_swap.assignment import Assignment, extend, from_saved, options_from
from pe_swap.attention.backends import name_for
from pe_swap.errors import FamilyError, SwapStateError
from pe_swap.families import Family, family_for, known_loss_type
from pe_swap.patching.holder import Original, SchemeHolder
from pe_swap.patching.install import assemble, attach, detach, holder_of
from pe_swap.saving.class_names import swapped_config_class
from pe_swap.saving.relative_key_bert import require_absolute_positions
from pe_swap.schemes import Scheme, SchemeOptions

Model = TypeVar("Model", bound=PreTrainedModel)


def swap_positional(
    model: Model, scheme: str | SchemeOptions | Scheme, *, layers: Iterable[int] | None = None, **options: Any
) -> Model:
    """Replace the positional components of a model, in place.

    The model's own position table goes, and every self-attention layer gets `scheme`; cross-attention is left alone. The swap
    completes, or raises and leaves the model bit for bit as it was. Swapping again replaces the scheme.

    Args:
        model: a transformers model of a family in `list_families()`, with any head: the model that is going to be saved, not the base
            model inside it.
        scheme: a name in `list_schemes()`, the options of a scheme, or a scheme, whose options are taken.
        layers: the layers that get the scheme, where not all do. The others keep the scheme they have; in a model not yet
            swapped they get none, and the table goes.
        options: the scheme's options.

    Returns:
        The model itself.

    Raises:
        UnknownNameError: no scheme has that name.
        OptionError: an option that does not exist, breaks its rule, or does not fit the model.
        LayerError: layers out of range, or given for a scheme that acts on the input.
        UnsupportedModelError: not a transformers model, a family without an family, or a causal scheme for an encoder.
        UnsupportedBackendError: an attention implementation that cannot honour the scheme.
        FamilyError: a module is not where the family says.
        SwapStateError: a scheme that starts from a position table, for a model that was loaded without one; or a model whose
            configuration and modules say different things.
    """
    family = family_for(model)
    base_model, config = model.base_model, model.config
    require_absolute_positions(config, type(model).__name__)
    current = holder_of(model)
    before = None if current is None else from_saved(config.pe_swap, config.num_hidden_layers)
    wanted = extend(before, options_from(scheme, options), layers, config.num_hidden_layers)
    original = _take_original(family, model) if current is None else current.original
    vectors = None if original is None else original.table.weight.detach().float()
    trained_length = config.pe_swap["trained_length"] if vectors is None else vectors.shape[0]
    geometry = family.geometry(config, trained_length)
    assignment = wanted.resolve(geometry, vectors)
    schemes = assignment.build(geometry)
    name_for(config._attn_implementation, assignment.attention_hooks())
    for new, options_wanted in zip(schemes, wanted.options, strict=True):
        kept = _kept_scheme(current, before, options_wanted)
        if kept is not None:
            new.load_state_dict({name: value for name, value in kept.state_dict().items() if name in new.state_dict()})
        elif vectors is not None:
            new.start_from(vectors)
        elif new.needs_table:
            raise SwapStateError(
                f"The scheme '{new.name}' starts from the model's own position table, but this model was loaded already swapped and has "
                "none left. Swap the model it was made from, or choose a scheme that needs no table."
            )
    if not geometry.is_causal and not any(new.tells_order for new in schemes):
        warnings.warn(
            f"The scheme '{schemes[0].name}' on an encoder leaves a bag of words: without a causal mask nothing tells the order of "
            "tokens. Use it as a baseline only; alibi, t5, rope and shaw have two-sided forms.",
            UserWarning,
            stacklevel=2,
        )
    holder = assemble(family, base_model, config, assignment, schemes, original)
    like = holder.tokens.weight
    holder.to(device=like.device, dtype=like.dtype).train(model.training)
    swapped_config = _swapped_config(family, config, holder, trained_length)

    if current is not None:
        detach(family, base_model)
    _set_config(model, config, swapped_config)
    attach(family, base_model, holder)
    model.loss_type = known_loss_type(model)
    return model


def _take_original(family: Family, model: PreTrainedModel) -> Original:
    """Return what the swap is about to replace; nothing is changed yet."""
    table = family.find(model.base_model, family.position_embedding)
    if not isinstance(table, nn.Embedding):
        raise FamilyError(
            f"{type(model.base_model).__name__}.{family.position_embedding} is a {type(table).__name__}, where an nn.Embedding was "
            "expected: something else has patched this model. Undo that patch before the swap."
        )
    tokens = cast(nn.Embedding, family.find(model.base_model, family.token_embedding))
    if not isinstance(getattr(tokens, "weight", None), Tensor):
        raise FamilyError(
            f"{type(model.base_model).__name__}.{family.token_embedding} is a {type(tokens).__name__}, which has no 'weight' whose "
            "dtype positions could take: something else has patched this model. Undo that patch before the swap."
        )
    length = getattr(model.config, family.length_field)
    return Original(table, tokens.weight.dtype, length, getattr(model, "loss_type", None))


def _kept_scheme(current: SchemeHolder | None, before: Assignment | None, options: SchemeOptions) -> Scheme | None:
    """Return the model's scheme that stays under these options: `extend` passes on the very object of one that stays."""
    if current is None or before is None:
        return None
    return next((current.scheme_at(index) for index, old in enumerate(before.options) if old is options), None)


def _swapped_config(family: Family, config: Any, holder: SchemeHolder, trained_length: int) -> Any:
    """Return a copy of `config` that says what the model is swapped to; other models that share `config` keep it."""
    swapped = copy.deepcopy(config)
    swapped.__class__ = swapped_config_class(family)
    swapped.describe(holder, trained_length)
    return swapped


def _set_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    """Give every module of the model the configuration `new`.

    By class and not by identity: an encoder-decoder model gives its parts configurations of their own, and leaves the modules inside
    them with the former ones.
    """
    for module in model.modules():
        if type(getattr(module, "config", None)) is type(old):
            module.config = new


def restore_positional(model: Model) -> Model:
    """Put a model's own positions back, bit for bit, in place.

    Args:
        model: a swapped model; one that is not swapped is returned as it is.

    Returns:
        The model itself. Whatever else has changed since the swap (weights, vocabulary, configuration) stays as it is now.

    Raises:
        SwapStateError: the model was loaded already swapped, so that its own table is not at hand.
    """
    family = family_for(model)
    holder = holder_of(model)
    if holder is None:
        return model
    original = holder.original
    if original is None:
        raise SwapStateError(
            f"This {type(model).__name__} was loaded already swapped; its own position table is not in the checkpoint. "
            "Load the model it was made from instead, or swap it to another scheme."
        )
    config = copy.deepcopy(model.config)
    config.release(original.length)
    detach(family, model.base_model)
    model.base_model.set_submodule(family.position_embedding, original.current(holder.tokens.weight))
    original.table.train(model.training)
    model.loss_type = original.loss_type
    _set_config(model, model.config, config)
    return model
