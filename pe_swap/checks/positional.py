"""Whether a swapped model keeps what its schemes promise, measured on the model in hand."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pe_swap.checks.images import ImageChecker
from pe_swap.checks.report import PositionalReport
from pe_swap.checks.text import TextChecker
from pe_swap.errors import SwapStateError
from pe_swap.families import composite_of
from pe_swap.patching.wrappers import acting_holders, inner_model


def check_positional(model: PreTrainedModel) -> PositionalReport:
    """Run the properties that a swapped model's schemes claim, on the model itself.

    Every scheme that acts inside attention is called in every layer it serves; the model's own scheme, swapped in, gives the unswapped
    states (on a copy of the model, where what was replaced is at hand); later tokens do not change earlier states of a decoder; cached
    chunks equal one uncached pass; a padded row equals the row alone; positions all moved by 17 change nothing where the scheme claims
    that; the order of tokens matters; a length beyond the trained one gives finite numbers. Random tokens, the model's own weights,
    dtype, device and attention implementation. Weights, random state and mode are left as they were.

    An encoder-decoder or a composite is checked part by part, each by itself; a decoder gets random states in place of its encoder's.

    Args:
        model: a swapped model, or a wrapper around one (PEFT, DistributedDataParallel, `torch.compile`): the model inside is checked.

    Returns:
        The report; `report.passed` sums it up.

    Raises:
        SwapStateError: the model is not swapped.
        UnsupportedModelError: not a model of a supported family.
    """
    model = inner_model(model)
    checkers = checkers_of(model)
    if not checkers:
        raise SwapStateError(
            f"This {type(model).__name__} is not swapped, so there is nothing to check. Call swap_positional(model, ...) first."
        )
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            checks = tuple(check for checker in checkers for check in checker.run_all())
    finally:
        for module, mode in was_training.items():
            module.training = mode
    said = dict.fromkeys([*(checker.title for checker in checkers), *(checker.implementation for checker in checkers)])
    title = f"{type(model).__name__} with {', '.join(said)}"
    return PositionalReport(title, max(checker.tolerance for checker in checkers), checks)


def checkers_of(model: PreTrainedModel) -> list[TextChecker]:
    """Return what checks a model: one per swapped stack of it, or of each model in a composite."""
    composite = composite_of(model)
    models = {"": model} if composite is None else composite.models_in(model)
    swapped = {name: found for name, found in models.items() if composite is None or hasattr(found.config, "pe_swap")}
    found = []
    for name, inside in swapped.items():
        for holder in acting_holders(inside):
            part = holder.stack.name or (name if len(swapped) > 1 else "")
            found.append((TextChecker if holder.patches is None else ImageChecker)(inside, holder, part))
    return found
