"""Whether a swapped model keeps what its schemes promise, measured on the model in hand."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pe_swap.checks.images import ImageChecker
from pe_swap.checks.report import PositionalReport
from pe_swap.checks.text import TextChecker
from pe_swap.errors import SwapStateError, UnsupportedModelError
from pe_swap.families import base_model_of, composite_of
from pe_swap.patching.layer_cache import parameters_of
from pe_swap.patching.wrappers import acting_holder, inner_model


def check_positional(model: PreTrainedModel) -> PositionalReport:
    """Run the properties that a swapped model's schemes claim, on the model itself.

    Every scheme that acts inside attention is called in every layer it serves; the model's own scheme, swapped in, gives the unswapped
    states (on a copy of the model, where what was replaced is at hand); later tokens do not change earlier states of a decoder; cached
    chunks equal one uncached pass; a padded row equals the row alone; positions all moved by 17 change nothing where the scheme claims
    that; the order of tokens matters; a length beyond the trained one gives finite numbers. Random tokens, the model's own weights,
    dtype, device and attention implementation. Weights, random state and mode are left as they were.

    Args:
        model: a swapped model, or a wrapper around one (PEFT, DistributedDataParallel, `torch.compile`): the model inside is checked.

    Returns:
        The report; `report.passed` sums it up.

    Raises:
        SwapStateError: the model is not swapped.
        UnsupportedModelError: not a model of a supported family, or an encoder with a decoder.
    """
    model = swapped_inside(inner_model(model))
    require_one_input(model)
    holder = acting_holder(model)
    if holder is None:
        raise SwapStateError(
            f"This {type(model).__name__} is not swapped, so there is nothing to check. Call swap_positional(model, ...) first."
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return (TextChecker if holder.patches is None else ImageChecker)(model, holder).report()
    finally:
        model.train(was_training)


def swapped_inside(model: PreTrainedModel) -> PreTrainedModel:
    """Return the swapped part of a composite, or the argument where it is no composite.

    Raises:
        SwapStateError: no part is swapped, or several are.
    """
    composite = composite_of(model)
    if composite is None:
        return model
    parts = {name: found for name, found in composite.models_in(model).items() if hasattr(found.config, "pe_swap")}
    if len(parts) == 1:
        return next(iter(parts.values()))
    raise SwapStateError(
        f"{len(parts)} parts of this {type(model).__name__} are swapped, and one model is checked at a time. Give the model inside: "
        f"{', '.join(f'the {name} part' for name in parts or composite.models_in(model))}."
    )


def require_one_input(model: PreTrainedModel) -> None:
    """Refuse a model whose decoder has an input of its own (T5, BART, Whisper): the checks give one row of tokens and compare its states.

    Raises:
        UnsupportedModelError: it has.
    """
    if "decoder_input_ids" in parameters_of(base_model_of(model)):
        raise UnsupportedModelError(
            f"This {type(model).__name__} has a decoder with an input of its own, and check_positional runs models of one input. Check "
            "the scheme on a model of one stack (of T5 the encoder: AutoModelForTextEncoding.from_pretrained of the saved folder), and "
            "compare this model's logits with and without use_cache."
        )
