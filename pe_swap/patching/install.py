"""Putting schemes into a model's modules, and taking them out. Used by a swap and by the loading of a swapped model."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_swap.assignment import Assignment, saved_stacks
from pe_swap.attention.names import BINDING_ATTRIBUTE
from pe_swap.errors import FamilyError, SwapStateError, UnsupportedModelError
from pe_swap.families import Stack, base_model_of, family_for
from pe_swap.families.attention_modules.interface import attention_class
from pe_swap.families.native import AddedBias, Grid, Rotary
from pe_swap.families.native.base import find
from pe_swap.families.native.grid import METHOD
from pe_swap.families.native.rotary import NATIVE, UNTURNED
from pe_swap.patching.binding import LayerBinding
from pe_swap.patching.caller_hook import CALLER_ATTRIBUTE, CallerBinding, prepare_call
from pe_swap.patching.grid_vectors import EMBEDDINGS, GridVectors, hook_embeddings, unhook_embeddings
from pe_swap.patching.holder import HolderRef, Original, SchemeHolder, TokenTable
from pe_swap.patching.hooks import add_pre_hook, hand_on_positions, remove_pre_hook
from pe_swap.patching.layer_cache import cache_argument, parameters_of
from pe_swap.patching.native_hook import HANDED_ATTRIBUTE, Handed, hand_in
from pe_swap.schemes import Scheme
from pe_swap.schemes.base import ATTENTION_HOOKS


def assemble(
    stack: Stack,
    base_model: nn.Module,
    config: Any,
    assignment: Assignment,
    schemes: list[Scheme],
    original: Original | None,
    mean: Tensor | None = None,
    prefix: Tensor | None = None,
) -> SchemeHolder:
    """Return the module that will hold a stack's schemes, not yet attached.

    Args:
        stack: the stack.
        base_model: the model that has it.
        config: the model's unswapped configuration.
        assignment: which scheme acts where.
        schemes: the built schemes.
        original: what they replace, or None where it is not at hand.
        mean: the table's mean row, `[input_size]`, where it stays.
        prefix: vectors of the tokens before the patches, `[rows, input_size]`, where the table has such.

    Raises:
        FamilyError: a module is not where the family says, or takes its cache by a name that pe_swap does not know.
    """
    tokens = token_table(stack, base_model)
    require_own_forward(stack, base_model, config)
    for module in stack.attention_modules(base_model, config):
        require_interface(stack, module)
        if stack.has_cache:
            cache_argument(module)
    if stack.has_cache:
        cache_argument(find(base_model, stack.caller))
    if assignment.input is not None:
        require_input(stack, base_model, tokens, schemes[assignment.input])
    patches = None if stack.patches is None else stack.patches.layout(config)
    holder = SchemeHolder(schemes, assignment, stack, tokens, stack.first_id(config), original, mean, prefix, patches)
    if isinstance(stack.native, Rotary):
        assert original is not None
        _hand_in_rotations(holder, stack.native, original.module, config)
    return holder


def require_interface(stack: Stack, module: nn.Module) -> None:
    """Refuse an attention module that calls no attention function: the schemes would be dropped in silence.

    Raises:
        FamilyError: its `forward` does not look one up, as in an older transformers.
    """
    forward: Any = inspect.unwrap(type(module).forward)
    if not stack.attention_class and "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        raise FamilyError(
            f"{type(module).__name__} of transformers {transformers.__version__} does its attention by hand, where its family expects a "
            "call of transformers' attention functions. Use a transformers version that pe_swap was tested with, or update pe_swap."
        )


def require_own_forward(stack: Stack, base_model: nn.Module, config: Any) -> None:
    """Refuse attention modules whose class would be set in vain: a `forward` of the instance's own is called in its place.

    Raises:
        FamilyError: something has put one there; or the class is another one.
    """
    if not stack.attention_class:
        return
    ours = attention_class(stack.attention_class)
    for path, module in zip(stack.paths(config), stack.attention_modules(base_model, config), strict=True):
        if type(module) not in (ours, ours.__mro__[1]):
            raise FamilyError(
                f"{type(base_model).__name__}.{path} is a {type(module).__name__}, and pe_swap knows {ours.__mro__[1].__name__}. Load the "
                'model with attn_implementation="eager" or "sdpa", and undo what else has changed it.'
            )
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            raise FamilyError(
                f"{type(base_model).__name__}.{path} has a forward of its own (accelerate puts one there with device_map), which this "
                "family's new attention would not replace. Call accelerate.hooks.remove_hook_from_module(model, recurse=True), "
                "swap or restore, then dispatch the model."
            )


def require_input(stack: Stack, base_model: nn.Module, tokens: TokenTable, scheme: Scheme) -> None:
    """Refuse a scheme on the input where the model cannot be handed embeddings, or takes them in another width than its positions.

    Raises:
        UnsupportedModelError: it cannot.
    """
    replaces = "embed" in scheme.hooks or ("encode" in scheme.hooks and stack.native.kind != "table")
    if not replaces or stack.patches is not None:
        return
    name = type(base_model).__name__
    if "inputs_embeds" not in parameters_of(find(base_model, stack.caller)):
        raise UnsupportedModelError(
            f"The scheme '{scheme.name}' replaces token embeddings, and {name} takes input_ids only. Choose a scheme that adds "
            "a vector, or one inside attention."
        )
    if tokens.weight.shape[-1] != scheme.geometry.input_size:
        raise UnsupportedModelError(
            f"The scheme '{scheme.name}' replaces token embeddings, and those of this {name} are {tokens.weight.shape[-1]} wide where its "
            f"positions are {scheme.geometry.input_size} wide. Choose a scheme that adds a vector, or one inside attention."
        )


def token_table(stack: Stack, base_model: nn.Module) -> TokenTable:
    """Return where a stack's token embeddings are.

    Raises:
        FamilyError: what is there has no weight.
    """
    assert stack.tokens is not None
    tokens = find(base_model, stack.tokens)
    if not isinstance(getattr(tokens, "weight", None), Tensor):
        raise FamilyError(
            f"{type(base_model).__name__}.{stack.tokens} is a {type(tokens).__name__}, which has no 'weight' whose dtype positions could "
            "take: something else has patched this model. Undo that patch before the swap."
        )
    return TokenTable(base_model, stack.tokens)


def _hand_in_rotations(holder: SchemeHolder, kind: Rotary, native: nn.Module, config: Any) -> None:
    """Decide what each layer is handed, and give the holder the modules that work it out."""
    names: list[str] = []
    for layer, index in enumerate(holder.assignment.layers):
        handed = NATIVE
        if index is not None:
            scheme = holder.scheme_at(index)
            name = kind.handed_in(scheme.options, kind.options(config, layer, native), native, config, layer)
            if name is None and kind.before_norm and "transform_query_key" in scheme.hooks and scheme.reads_position_ids:
                raise SwapStateError(
                    f"The scheme '{scheme.name}' turns queries and keys in the attention function, and this model normalises them after "
                    "it has turned them, so the turn would stand in another place. Use rope in the model's own layout and fraction, or a "
                    "scheme with a bias."
                )
            handed = {None: UNTURNED, NATIVE: NATIVE}.get(name, str(index))
        names.append(handed)
    holder.handed = tuple(names)
    used = set(names)
    holder.handed_to_all = (
        names[0] if len(used) == 1 else NATIVE if NATIVE in used else UNTURNED if UNTURNED in used else names[0]
    )
    for name in sorted(used):
        if name == NATIVE:
            holder.kept[name] = _without_saved_buffers(native)
        elif name == UNTURNED:
            holder.kept[name] = kind.unturned(native, config)
        else:
            scheme = holder.scheme_at(int(name))
            holder.kept[name] = kind.rotation_of(native, config, scheme.options, holder.assignment.served_by(int(name)))


def _without_saved_buffers(native: nn.Module) -> nn.Module:
    """Return a shallow copy of a module that shares its tensors and saves none of them (ESM's frequencies are saved)."""
    shared = copy.copy(native)
    shared._non_persistent_buffers_set = set(native._buffers)
    return shared


def layer_hooks(holder: SchemeHolder, layer: int) -> frozenset[str]:
    """Return the hooks of a layer's scheme that act in the attention function: not a turn that the layer is handed."""
    index = holder.assignment.layers[layer]
    if index is None:
        return frozenset()
    hooks = holder.scheme_at(index).hooks & ATTENTION_HOOKS
    return hooks if holder.handed[layer] in (None, UNTURNED) else hooks - {"transform_query_key"}


def attention_hooks(holder: SchemeHolder) -> frozenset[str]:
    """Return the hooks that act in the attention function of any layer."""
    return frozenset[str]().union(*(layer_hooks(holder, layer) for layer in range(len(holder.assignment.layers))))


def attach(stack: Stack, base_model: nn.Module, config: Any, holder: SchemeHolder) -> None:
    """Put `holder` in its place and bind every layer that has a scheme."""
    owner, _, attribute = stack.native.holder_path.rpartition(".")
    holder_ref = HolderRef(base_model, stack.native.holder_path)
    if isinstance(stack.native, Grid):
        stack.native.take_out(base_model)
        vars(base_model.get_submodule(owner))[METHOD] = GridVectors(holder_ref)
    elif stack.patches is not None and holder.input_hook("encode") is not None:
        hook_embeddings(find(base_model, EMBEDDINGS), holder_ref)
    base_model.get_submodule(owner).add_module(attribute, holder)
    caller = find(base_model, stack.caller)
    pad_token_id = getattr(config, "pad_token_id", None)
    token_scale = float(getattr(caller, stack.token_scale)) if stack.token_scale else 1.0
    binding = CallerBinding(holder_ref, stack, holder.first_id, pad_token_id, token_scale, parameters_of(caller))
    setattr(caller, CALLER_ATTRIBUTE, binding)
    add_pre_hook(caller, prepare_call)
    for layer, module in enumerate(stack.attention_modules(base_model, config)):
        index = holder.assignment.layers[layer]
        if index is not None:
            hooks = layer_hooks(holder, layer)
            if hooks:
                taken = cache_argument(module) if stack.has_cache else None
                setattr(
                    module,
                    BINDING_ATTRIBUTE,
                    LayerBinding(
                        holder_ref,
                        index,
                        layer,
                        cache_layer(module, layer),
                        hooks,
                        parameters_of(module),
                        taken,
                        stack.query_is_scaled,
                        stack.ids_from_mask,
                        hands_zeros_on(holder),
                    ),
                )
                add_pre_hook(module, hand_on_positions)
        handed = handed_to(holder, holder_ref, config, layer)
        if handed is not None:
            setattr(module, HANDED_ATTRIBUTE, handed)
            add_pre_hook(module, hand_in)  # before the other, which takes the arguments that it reads
    if stack.attention_class and attention_hooks(holder):
        for layer, module in enumerate(stack.attention_modules(base_model, config)):
            if stack.native.kind == "rotary" or layer_hooks(holder, layer):
                set_class(module, attention_class(stack.attention_class))


def cache_layer(module: Any, layer: int) -> int:
    """Return the index under which an attention module keeps its keys in a cache: its own, where it has one."""
    own = getattr(module, "layer_idx", None)
    return own if isinstance(own, int) else layer


def set_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Set a module's class. Hooks of accelerate that were removed leave the old class's `forward` bound to the module: it goes."""
    vars(module).pop("forward", None)
    module.__class__ = new


def handed_to(holder: SchemeHolder, holder_ref: HolderRef, config: Any, layer: int) -> Handed | None:
    """Return what a layer is handed in place of what all layers are, or None."""
    native = holder.stack.native
    if isinstance(native, Rotary):
        name = holder.handed[layer]
        if name is None or name == holder.handed_to_all:
            return None
        layer_types = getattr(config, "layer_types", None)
        takes_type = "layer_type" in inspect.signature(holder.kept[name].forward).parameters
        return Handed(holder_ref, native, name, layer_types[layer] if takes_type and layer_types else None)
    if isinstance(native, AddedBias):
        silent = holder.assignment.layers[layer] is not None if native.each_layer else layer == 0 and hands_zeros_on(holder)
        return Handed(holder_ref, native, "", None) if silent else None
    return None


def hands_zeros_on(holder: SchemeHolder) -> bool:
    """Tell whether the first layer is handed zeros for a bias that it would work out and hand on: no layer is to add the model's own."""
    native = holder.stack.native
    return isinstance(native, AddedBias) and not native.each_layer and None not in holder.assignment.layers


def detach(stack: Stack, base_model: nn.Module, config: Any, holder: SchemeHolder) -> None:
    """Undo `attach`, and put what was replaced back where it is at hand; a table that is not leaves its place to the next holder."""
    caller = find(base_model, stack.caller)
    remove_pre_hook(caller, prepare_call)
    delattr(caller, CALLER_ATTRIBUTE)
    for module in stack.attention_modules(base_model, config):
        for attribute, hook in ((BINDING_ATTRIBUTE, hand_on_positions), (HANDED_ATTRIBUTE, hand_in)):
            if hasattr(module, attribute):
                remove_pre_hook(module, hook)
                delattr(module, attribute)
        if stack.attention_class and isinstance(module, attention_class(stack.attention_class)):
            set_class(module, type(module).__mro__[1])
    if isinstance(stack.native, Grid):
        vars(find(base_model, stack.native.owner_path)).pop(METHOD, None)
    elif stack.patches is not None:
        unhook_embeddings(find(base_model, EMBEDDINGS))
    if isinstance(stack.native, Grid) and holder.original is not None:
        stack.native.put_back(base_model, holder.original.current(holder.tokens))
    elif isinstance(stack.native, AddedBias):
        owner, _, attribute = stack.native.holder_path.rpartition(".")
        delattr(base_model.get_submodule(owner), attribute)
    elif holder.original is not None:
        base_model.set_submodule(stack.native.holder_path, holder.original.current(holder.tokens))


def holder_of(model: PreTrainedModel, part: str = "") -> SchemeHolder | None:
    """Return the module that holds the schemes of a model's stack, or None where the stack is not swapped.

    Args:
        model: the model.
        part: the stack's name, where the family has several.
    """
    stack = next(
        stack for stack in family_for(model).stacks_in(base_model_of(model), model.config) if stack.name == part or not part
    )
    return holder_in(model, stack)


def holder_in(model: PreTrainedModel, stack: Stack) -> SchemeHolder | None:
    """Return the module that holds the schemes of one stack of a model, or None where the stack is not swapped.

    Raises:
        SwapStateError: the model's configuration and its modules say different things.
    """
    base_model = base_model_of(model)
    path = stack.native.holder_path
    try:
        found: Any = base_model.get_submodule(path)
    except AttributeError:
        found = None
    saved = getattr(model.config, "pe_swap", None)
    says_swapped = saved is not None and stack.name in saved_stacks(saved)
    head, base = type(model).__name__, type(base_model).__name__
    is_holder = isinstance(found, SchemeHolder)
    if is_holder and not says_swapped:
        raise SwapStateError(
            f"This {head} holds a {base} that was swapped by itself, and its own configuration does not say so: saved, it would come "
            f"back with random positions. Call restore_positional on the {base}, then swap the {head}."
        )
    if says_swapped and not is_holder:
        raise SwapStateError(
            f"The configuration of this {head} says that it is swapped, but {base}.{path} is a {type(found).__name__}: something else has "
            "replaced the module that holds its schemes. Undo that before a swap or a restore."
        )
    return found if is_holder else None


def holders_of(model: PreTrainedModel) -> list[SchemeHolder]:
    """Return the holders of every swapped stack of a model."""
    found = (holder_in(model, stack) for stack in family_for(model).stacks_in(base_model_of(model), model.config))
    return [holder for holder in found if holder is not None]


def positional_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that a swap brought, with their names in `model`: those that start untrained.

    A training gives them a higher learning rate than the rest (README, "Training").

    Args:
        model: a swapped model; also one in a wrapper (PEFT, DDP), one made of several models, and one that is not swapped, which has none.
            Where PEFT trains a copy of them (`modules_to_save`), copy and original are there, and the original is frozen.
    """
    holders = (module for module in model.modules() if isinstance(module, SchemeHolder))
    ours = {id(parameter) for holder in holders for parameter in holder.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in ours]
