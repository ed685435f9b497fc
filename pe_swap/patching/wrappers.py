"""What tools put around a swapped model, and around the module of its schemes inside it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pe_swap.families import base_model_of, family_for
from pe_swap.patching.holder import SchemeHolder
from pe_swap.patching.install import holder_in

NAMES_INSIDE_WRAPPERS = ("module", "_orig_mod", "base_model", "model")
"""Where wrappers register what they wrap: data parallel ones, `torch.compile`, PEFT's model and PEFT's tuner."""


def inner_model(model: Any) -> Any:
    """Return the transformers model inside a wrapper (PEFT, DistributedDataParallel, `torch.compile`), or the argument where none is.

    For reading only: a swap belongs before the wrapping, since a wrapper keeps references to the modules that a swap replaces.
    """
    found = model
    while isinstance(found, nn.Module) and not isinstance(found, PreTrainedModel):
        inside = [found._modules[name] for name in NAMES_INSIDE_WRAPPERS if found._modules.get(name) is not None]
        if not inside:
            return model
        found = inside[0]
    return found


def acting_holders(model: PreTrainedModel) -> list[SchemeHolder]:
    """Return the modules whose schemes act in a model, one per swapped stack, in the order of the stacks.

    PEFT's `modules_to_save` puts a copy of such a module, to be trained, into its place.

    Raises:
        SwapStateError: see `holder_in`.
    """
    base_model = base_model_of(model)
    modules = dict(base_model.named_modules())
    found = []
    for stack in family_for(model).stacks_in(base_model, model.config):
        place: Any = modules.get(stack.native.holder_path)
        acting = getattr(
            getattr(place, "scheme_at", None), "__self__", None
        )  # a wrapper passes on the methods of what acts in it
        holder = acting if isinstance(acting, SchemeHolder) and acting is not place else holder_in(model, stack)
        if holder is not None:
            found.append(holder)
    return found
