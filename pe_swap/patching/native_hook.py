"""The pre-hook by which a layer with a scheme is handed something else than the model's own positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pe_swap.attention.names import library_name
from pe_swap.attention.shared_in_call import ARGUMENT, NOTHING_SHARED, SharedInCall
from pe_swap.errors import UnsupportedModelError
from pe_swap.families.attention_modules.interface import CACHE_ARGUMENTS
from pe_swap.families.native import AddedBias, Bias, Rotary
from pe_swap.patching.holder import HolderRef
from pe_swap.patching.layer_cache import self_attention_cache

HANDED_ATTRIBUTE = "pe_swap_handed"


@dataclass(frozen=True)
class Handed:
    """What one layer is handed.

    Attributes:
        holder_ref: where the stack's schemes are.
        native: the kind of the model's own positions.
        name: for a rotation, its name in the holder's `kept`.
        layer_type: the layer's type, where the model has a rotation per type.
    """

    holder_ref: HolderRef
    native: Rotary | AddedBias
    name: str
    layer_type: str | None


def number_of_keys(hidden_states: Tensor, kwargs: dict[str, Any]) -> int:
    """Return how many keys the first attention module of a call will have, those of its cache included."""
    q_len = hidden_states.shape[1]
    cache = next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    return q_len if cache is None else int(self_attention_cache(cache).get_mask_sizes(q_len, 0)[0])


def hand_in(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the model's own positions in a layer's arguments."""
    handed: Handed = getattr(module, HANDED_ATTRIBUTE)
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    native = handed.native
    if isinstance(native, AddedBias):
        assert native.argument is not None
        fade = handed.holder_ref.holder.fade
        num_keys = partial(number_of_keys, hidden_states, kwargs)
        bias = fade * kwargs[native.argument] if fade else native.neutral(hidden_states, num_keys)
        if isinstance(native, Bias) and library_name(module.config._attn_implementation) == "flex_attention":
            # transformers reads it there by row, head, query and key; on a GPU nothing checks that it has as many
            assert bias is not None
            bias = bias.expand(len(hidden_states), module.n_heads, hidden_states.shape[1], -1)
        return args, {**kwargs, native.argument: bias}
    shared: SharedInCall = kwargs.get(ARGUMENT, NOTHING_SHARED)
    given = (
        kwargs.get("position_ids") if shared.position_ids is None else shared.position_ids
    )  # some layers hand on no more than these
    if given is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called without position ids, by which its scheme turns. Call the whole model, not a layer of it."
        )
    position_ids: Tensor = given

    def compute() -> Any:
        holder = handed.holder_ref.holder
        return native.handed(holder, handed.name, hidden_states, position_ids, handed.layer_type, shared.sides)

    rotation = shared.constant(("rotation", handed.name, handed.layer_type, hidden_states.device), compute)
    return args, {**kwargs, native.argument: rotation}
