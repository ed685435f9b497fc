"""Swapping a model's positions, and putting them back: resolve, build, commit."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_swap.assignment import Assignment, extend, starting_from_table
from pe_swap.attention.names import require_honoured
from pe_swap.errors import FamilyError, OptionError, SwapStateError, UnsupportedModelError
from pe_swap.families import Family, Stack, base_model_of, composite_of, family_for, known_loss_type
from pe_swap.patching.devices import bring_back_offloaded, offloaded_at_hand
from pe_swap.patching.holder import Original, SchemeHolder, TokenTable, trained_together
from pe_swap.patching.install import (
    assemble,
    attach,
    attention_hooks,
    detach,
    holder_in,
    layer_hooks,
    require_own_forward,
    token_table,
)
from pe_swap.patching.split_heads import require_whole_heads
from pe_swap.plans import Part, layers_from, wanted_parts
from pe_swap.saving.module_configs import composite_configs, own_configs, set_configs, swapped_config, swapped_configs
from pe_swap.saving.relative_key_bert import require_absolute_positions
from pe_swap.schemes import SCHEMES, Scheme, SchemeOptions
from pe_swap.schemes.base import INPUT_HOOKS, hooks_of, on_a_grid, two_sided
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_LENGTH
from pe_swap.schemes.parameters import root_mean_square

Model = TypeVar("Model", bound=PreTrainedModel)


def swap_positional(
    model: Model,
    scheme: str | SchemeOptions | Scheme | None = None,
    *,
    plan: str | None = None,
    layers: Iterable[int] | str | None = None,
    part: str | None = None,
    trained_length: int | None = None,
    keep_mean: bool | None = None,
    **options: Any,
) -> Model:
    """Replace the positional components of a model, in place.

    Every self-attention layer gets `scheme`, and the model's own positions go; cross-attention is left alone. The swap completes, or raises
    and leaves the model bit for bit as it was. Swapping again replaces the scheme.

    Args:
        model: a transformers model of a family in `list_families()`, with any head, or a composite of such models (LLaVA, CLIP): the
            model that is going to be saved, not the one inside it.
        scheme: a name in `list_schemes()`, the options of a scheme, or a scheme, whose options are taken.
        plan: a name in `pe_swap.plans.PLANS`, in place of a scheme: which layers get which scheme, as published models mix them.
        layers: the layers that get the scheme, where not all do: indices, or in words "every:4" (the fourth, eighth, ...), "not every:4",
            "first_half", "second_half". The others keep what they have: their scheme, or the model's own rotation
            or bias. A position table goes as a whole, as all layers share it through the input; layers without a scheme then have none.
        part: `"encoder"` or `"decoder"` of an encoder-decoder, None for both; or one of the models inside a composite (`"text"`,
            `"vision"`), None for the one that the composite is about (the text model of a LLaVA, the image encoder of a CLIP).
        trained_length: the length that the model was trained at, in positions, from which schemes derive sizes; None takes the model's.
        keep_mean: where the model's own positions are a table: keep its mean row, as a constant that is added to every token embedding
            beside the new scheme. It is saved with the model and not trained. None keeps it beside schemes that it was measured to help
            (`Scheme.keeps_mean`: those that turn queries and keys), in a decoder; a later swap of
            some layers leaves it as it is.
        options: the scheme's options. Those left out take the value that the model's own positions have for them, where they have one.

    Returns:
        The model itself.

    Raises:
        UnknownNameError: no scheme has that name.
        OptionError: an option that does not exist, breaks its rule, or does not fit the model; `keep_mean` without a table, or beside a
            scheme that starts from the table; a plan that leaves layers with the model's own positions, where those are a table.
        LayerError: layers out of range, or given for a scheme that acts on the input.
        UnsupportedModelError: not a transformers model, no known family, or a causal scheme for an encoder.
        UnsupportedBackendError: an attention implementation that cannot honour the scheme.
        FamilyError: a module is not where the family says.
        SwapStateError: a model whose configuration and modules say different things.
    """
    composite = composite_of(model)
    inside = {"": model} if composite is None else composite.chosen(model, part)
    for found in inside.values():
        require_no_axes(found, options)
    wanted = wanted_parts(scheme, plan, layers, options)

    # Resolve and build, of every model inside: nothing is changed yet.
    prepared: list[Prepared] = []
    for name, found in inside.items():
        prepared.append(prepare(found, wanted, part if composite is None else None, trained_length, keep_mean))
        if composite is not None:
            for acting in prepared[-1].schemes():
                composite.require_fits(name, acting)
    if plan is not None:
        require_plan_fits(plan, model, [change for each in prepared for change in each.changes])
    for each in prepared:
        if not any(acting.tells_order for acting in each.schemes()):
            warn_of_no_order(each.changes)
    replaced = {id(config): new for each in prepared for config, new in each.configs}
    of_whole = {} if composite is None else composite_configs(composite, model, replaced)

    # Commit: nothing below can fail.
    for each in prepared:
        commit(each)
    if composite is not None:
        set_configs(model, of_whole)
        model.name_or_path = ""
    return model


def require_plan_fits(plan: str, model: PreTrainedModel, changes: list[Change]) -> None:
    """Refuse a plan whose other layers keep the model's own positions, in a model that loses them as a whole.

    Raises:
        OptionError: its positions are a table, and some layer would be left without any.
    """
    for change in changes:
        if None in change.assignment.layers and not change.stack.native.keeps_layers:
            raise OptionError(
                f"The plan '{plan}' leaves layers with the positions that they have, and those of this {type(model).__name__} are a table "
                "that all layers share and that goes as a whole. Swap all layers to a scheme first, such as rope."
            )


def require_no_axes(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse `axes` among the options: a model's positions have as many as they have.

    Raises:
        OptionError: it is given.
        UnsupportedModelError: the model is of no known family.
    """
    family = family_for(model)
    if "axes" in options:
        axes = 2 if family.takes_images else 1
        raise OptionError(
            f"axes is {options['axes']!r}, but the positions of this {type(model).__name__} have {axes}, and a scheme takes them as they "
            "are. Leave axes out."
        )


@dataclass(frozen=True)
class Prepared:
    """A swap that is worked out whole, beside its model, and not done yet.

    Attributes:
        model: the model.
        changes: what it does to each stack.
        holders: what holds the schemes of each swapped stack afterwards, by the stack's name.
        configs: configuration objects of the model's modules, each with the one that takes its place.
    """

    model: PreTrainedModel
    changes: list[Change]
    holders: dict[str, SchemeHolder]
    configs: list[tuple[Any, Any]]

    def schemes(self) -> list[Scheme]:
        """Return all schemes that will act in the model."""
        return [scheme for holder in self.holders.values() for scheme in holder]


def prepare(
    model: PreTrainedModel,
    wanted: list[Part],
    part: str | None,
    trained_length: int | None,
    keep_mean: bool | None,
) -> Prepared:
    """Return a swap of a model, worked out and built; the model is not changed."""
    family = family_for(model)
    require_absolute_positions(model.config, type(model).__name__)
    changes = [resolve(model, stack, wanted, trained_length, keep_mean) for stack in chosen_stacks(family, model, part)]
    holders = {change.stack.name: build(model, change) for change in changes}
    for change in changes:
        holder = holders[change.stack.name]
        for layer, module in enumerate(change.stack.attention_modules(base_model_of(model), model.config)):
            index = holder.assignment.layers[layer]
            if index is not None:
                require_whole_heads(module, layer, holder.scheme_at(index), layer_hooks(holder, layer))
    for stack in family.stacks_in(family.base_model(model), model.config):
        untouched = holder_in(model, stack)
        if stack.name not in holders and untouched is not None:
            holders[stack.name] = untouched
    hooks = frozenset[str]().union(*(attention_hooks(holder) for holder in holders.values()))
    require_honoured(model.config._attn_implementation, hooks)
    lengths = {change.stack.name: None if change.original is None else change.original.length for change in changes}
    configs = swapped_configs(family, model, holders, lengths)
    return Prepared(model, changes, holders, configs)


def commit(prepared: Prepared) -> None:
    """Do a swap that is worked out: nothing in it can fail."""
    model = prepared.model
    for change in prepared.changes:
        if change.current is not None:
            detach(change.stack, base_model_of(model), model.config, change.current)
    set_configs(model, {id(config): new for config, new in prepared.configs})
    for change in prepared.changes:
        attach(change.stack, base_model_of(model), model.config, prepared.holders[change.stack.name])
    model.loss_type = known_loss_type(model)
    forget_dequantized_gguf(model)
    # The folder it was loaded from holds another model now. PEFT writes this name into an adapter, as the model to load it on.
    model.name_or_path = ""


def forget_dequantized_gguf(model: PreTrainedModel) -> None:
    """Drop the mark of a GGUF file whose weights were all written out as numbers: transformers neither saves nor trains what has it.

    A model that keeps packed weights keeps the mark.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if getattr(method, "value", method) == "gguf" and not quantizer.packed_modules:
        quantizer.remove_quantization_config(model)


@dataclass(frozen=True)
class Change:
    """What a swap will do to one stack.

    Attributes:
        stack: the stack.
        current: what holds its schemes now, or None where it is not swapped.
        assignment: which scheme will act where.
        kept: for each scheme, its index in `current`, or None for a new one.
        geometry: the sizes of the stack.
        native: the stack's own positions.
        original: the module that is replaced, or None where it is not at hand.
        config: the unswapped configuration.
        mean: the mean row of the table, `[input_size]`, where it stays; else None.
        prefix: vectors of the tokens before the patches that the table has too; else None.
    """

    stack: Stack
    current: SchemeHolder | None
    assignment: Assignment
    kept: tuple[int | None, ...]
    geometry: Geometry
    native: Native
    original: Original | None
    config: Any
    mean: Tensor | None
    prefix: Tensor | None


def chosen_stacks(family: Family, model: PreTrainedModel, part: str | None) -> list[Stack]:
    """Return the stacks that a swap or a restore is for.

    Raises:
        UnsupportedModelError: the family has no such part.
    """
    stacks = family.stacks_in(family.base_model(model), model.config)
    chosen = [stack for stack in stacks if part is None or stack.name == part]
    if not family.stacks_of(model.config):
        raise UnsupportedModelError(
            f"The configuration of this {type(model).__name__} gives it positions that pe_swap does not know, or none; other models of "
            f"the family '{family.model_type}' have some that it knows. Use a model that is configured otherwise."
        )
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers whose positions pe_swap knows, and others of its family have. Use "
            "a model with the family's language model head."
        )
    if not chosen:
        names = " or ".join(f"'{stack.name}'" for stack in stacks if stack.name) or "none: it has one stack of layers"
        raise UnsupportedModelError(
            f"part is {part!r}, and the parts of a {family.model_type} are {names}. Leave it out, or name one of them."
        )
    return chosen


def resolve(
    model: PreTrainedModel, stack: Stack, parts: list[Part], trained_length: int | None, keep_mean: bool | None
) -> Change:
    """Return what a swap to the schemes of `parts` will do to a stack."""
    base_model = base_model_of(model)
    current = holder_in(model, stack)
    config = model.config if current is None else model.config.unswapped()
    kind, paths = stack.native, stack.paths(config)
    parts = [(options, None if layers is None else layers_from(layers, len(paths))) for options, layers in parts]
    if current is None:
        module = kind.require_native(base_model)
        length = getattr(config, stack.length_field) if stack.length_field else None
        weight = token_table(stack, base_model).weight
        original: Original | None = Original(
            module, weight.dtype, length, getattr(model, "loss_type", None), config, trained_together(module, weight)
        )
    else:
        original = current.original
        if any(layers is not None for _, layers in parts):
            model.config.require_same_layers()
    before = None if current is None else current.assignment
    kept: tuple[int | None, ...] = tuple(range(len(before.options))) if before is not None else ()
    for options, chosen in parts:
        if chosen is None and options.scheme == kind.own_scheme:
            has_own = [layer for layer in range(len(paths)) if kind.acts_in(config, layer)]
            if len(has_own) < len(paths):  # the model's own plan: layers without positions stay without
                before, chosen = None, has_own
        before, from_before = extend(before, options, chosen, len(paths))
        kept = tuple(None if at is None else kept[at] for at in from_before)
    assert before is not None
    tokens = token_table(stack, base_model)
    found = None if original is None else original.with_numbers(tokens.device)
    added_to_tokens = kind.kind != "table" and stack.patches is None and bool(INPUT_HOOKS & hooks_of(SCHEMES[parts[0][0].scheme]))
    with offloaded_at_hand(found, tokens.module if added_to_tokens else None):
        table, bias_table, prefix = kind.table(config, found), kind.bias_table(found), kind.prefix(found)
        token_rms = token_size(tokens) if added_to_tokens else None
    require_numbers(model, tokens, [table, bias_table, prefix])
    if stack.patches is not None:
        if trained_length is not None:
            raise OptionError(
                f"trained_length is {trained_length!r}, but the positions of this {type(model).__name__} are the rows and columns of "
                "patches, whose trained number is said by image_size and patch_size of its configuration. Leave it out."
            )
        trained_length = stack.patches.layout(config).trained_tokens
    if trained_length is None:
        trained_length = kind.trained_length(config, found) if current is None else current.trained_length
    if not isinstance(trained_length, int) or isinstance(trained_length, bool) or not 1 <= trained_length <= LARGEST_LENGTH:
        raise OptionError(
            f"trained_length is {trained_length!r}; it must be an integer from 1 to {LARGEST_LENGTH:,}. Give the length that the model was "
            "trained at: swap_positional(model, ..., trained_length=512)."
        )
    geometry = stack.geometry(base_model, config, trained_length)
    if geometry.sides and table is not None and len(table) != math.prod(geometry.sides):
        raise FamilyError(
            f"This {type(model).__name__} has positions for {len(table)} patches, and image_size and patch_size of its configuration say "
            f"{' x '.join(map(str, geometry.sides))}. Set them to those that the model was trained with."
        )
    native = Native(
        table=table,
        token_rms=token_rms,
        options=kind.options(config, 0, found),
        bias_table=bias_table,
    )
    natives = [dataclasses.replace(native, options=kind.options(config, layer, found)) for layer in range(len(paths))]
    assignment, origins = before.resolve(geometry, natives)
    mean = None
    if current is not None and keep_mean is None and any(at is not None for at in kept):
        mean = current.mean  # a scheme of before stays, and all layers share the input
    elif keep_mean is None:
        keep_mean = keeps_mean(stack, geometry, assignment, table, current)
    if keep_mean not in (None, False):
        require_keep_mean(keep_mean, model, stack, assignment)
        mean = mean_row(model, table, current)
    prefix = prefix if current is None else current.prefix
    return Change(stack, current, assignment, tuple(kept[at] for at in origins), geometry, native, original, config, mean, prefix)


def keeps_mean(
    stack: Stack, geometry: Geometry, assignment: Assignment, table: Tensor | None, current: SchemeHolder | None
) -> bool:
    """Tell whether the mean of a table is kept where nobody says: in a decoder, at hand, beside a scheme that it helps."""
    at_hand = table is not None or (current is not None and current.mean is not None)
    names = {options.scheme for options in assignment.options}
    helps = any(SCHEMES[name].keeps_mean for name in names) and not names & set(starting_from_table())
    return stack.native.kind == "table" and geometry.is_causal and at_hand and helps


def require_keep_mean(keep_mean: object, model: PreTrainedModel, stack: Stack, assignment: Assignment) -> None:
    """Refuse to keep the mean of a table where the model has no table, or where a scheme holds the mean already.

    Raises:
        OptionError: it cannot be kept.
    """
    if keep_mean is not True:
        raise OptionError(f"keep_mean is {keep_mean!r}; it must be True, False or None. Give one of them.")
    if stack.native.kind not in ("table", "grid"):
        of_stack = f" in its {stack.name}" if stack.name else ""
        raise OptionError(
            f"keep_mean is True, but the positions of this {type(model).__name__}{of_stack} are no table, so they have no mean row. Leave "
            "keep_mean out; it is for models that add a table of positions to the token embeddings."
        )
    own = starting_from_table()
    holds_it = next((options.scheme for options in assignment.options if options.scheme in own), None)
    if holds_it is not None:
        raise OptionError(
            f"keep_mean is True beside the scheme '{holds_it}', which starts from the table itself, so the mean would come in twice. Leave "
            f"keep_mean out; it is for schemes other than {' and '.join(own)}."
        )


def mean_row(model: PreTrainedModel, table: Tensor | None, current: SchemeHolder | None) -> Tensor:
    """Return the mean of a table's rows, `[input_size]`, or what a swap before kept of it.

    Raises:
        SwapStateError: the model was loaded already swapped, without a mean.
    """
    if table is not None:
        return table.mean(0)
    if current is not None and current.mean is not None:
        return current.mean
    raise SwapStateError(
        f"keep_mean is True, but this {type(model).__name__} was loaded already swapped, and its own position table is not in the "
        "checkpoint. Leave keep_mean out, or swap the model it was made from."
    )


def require_numbers(model: PreTrainedModel, tokens: TokenTable, own: Iterable[Tensor | None]) -> None:
    """Refuse a model whose own positions alone are no numbers: every scheme that starts from them would start from nothing.

    Raises:
        SwapStateError: they are on the device `meta`, and its token embeddings are not.
    """
    if tokens.device.type != "meta" and any(tensor is not None and tensor.is_meta for tensor in own):
        raise SwapStateError(
            f"The positions of this {type(model).__name__} are on the device 'meta', so they have shapes and no numbers. Load its weights, "
            "or swap it before accelerate offloads it."
        )


def token_size(tokens: TokenTable) -> float | None:
    """Return the root mean square of the token embeddings as the model makes them, over its vocabulary; None where they are no numbers."""
    if tokens.weight.is_meta:
        return None
    with torch.no_grad():
        return root_mean_square(tokens.module(torch.arange(min(len(tokens.weight), 4096), device=tokens.weight.device)))


def build(model: PreTrainedModel, change: Change) -> SchemeHolder:
    """Return the holder that a change puts in place, its schemes started from what they replace."""
    schemes = change.assignment.build(change.geometry)
    for new, old in zip(schemes, change.kept, strict=True):
        if old is not None and change.current is not None:
            bring_back_offloaded(change.current)
            state = change.current.scheme_at(old).state_dict()
            new.load_state_dict({name: value for name, value in state.items() if name in new.state_dict()})
        else:
            if new.starts_from_table and change.native.table is None and change.stack.native.kind in ("table", "grid"):
                raise SwapStateError(
                    f"The scheme '{new.name}' starts from the model's own position table, but this model was loaded already swapped and "
                    "has none left. Swap the model it was made from, or choose a scheme that needs no table."
                )
            new.start_from(change.native)
            new.keeps_function = new.keeps_function and new.options.sliding_window is None
    holder = assemble(
        change.stack,
        base_model_of(model),
        change.config,
        change.assignment,
        schemes,
        change.original,
        change.mean,
        change.prefix,
    )
    kept, holder.kept = holder.kept, nn.ModuleDict()
    holder.to(device=holder.tokens.device, dtype=holder.tokens.weight.dtype)
    holder.kept = kept
    return holder.train(model.training)


def warn_of_no_order(changes: list[Change]) -> None:
    """Warn where an encoder is left without the order of its tokens."""
    for change in changes:
        if not change.geometry.is_causal:
            name, sides = change.assignment.options[0].scheme, change.geometry.sides
            lost = "places of patches" if sides else "order of tokens"
            others = [other for other in on_a_grid() if other != name] if sides else two_sided()
            warnings.warn(
                f"The scheme '{name}' on an encoder leaves no {lost}: there is no causal mask, so the output does not depend on it. Use "
                f"it as a baseline only; schemes that tell order are {', '.join(others)}.",
                UserWarning,
                stacklevel=3,
            )


def restore_positional(model: Model, *, part: str | None = None) -> Model:
    """Put a model's own positions back, bit for bit, in place.

    Args:
        model: a swapped model; one that is not swapped is returned as it is.
        part: `"encoder"` or `"decoder"` of an encoder-decoder, or a part of a composite; None for all that is swapped.

    Returns:
        The model itself. Whatever else has changed since the swap (weights, vocabulary, configuration) stays as it is now.

    Raises:
        SwapStateError: the model was loaded already swapped, and its own position table is not in the checkpoint.
    """
    composite = composite_of(model)
    if composite is None:
        put_back(model, leaving_stacks(model, part))
        return model
    inside = composite.models_in(model) if part is None else composite.chosen(model, part)
    leaving = [(found, leaving_stacks(found, None)) for found in inside.values() if hasattr(found.config, "pe_swap")]
    if leaving:
        for found, stacks in leaving:
            put_back(found, stacks)
        set_configs(model, composite_configs(composite, model, {}))
        if not hasattr(model.config, "pe_swap"):
            model.name_or_path = model.config.name_or_path
    return model


def leaving_stacks(model: PreTrainedModel, part: str | None) -> list[Stack]:
    """Return the stacks that a restore puts back, none where nothing is swapped.

    Raises:
        SwapStateError: the module that was replaced is not at hand.
    """
    family = family_for(model)
    leaving = [stack for stack in chosen_stacks(family, model, part) if holder_in(model, stack) is not None]
    for stack in leaving:
        require_own_forward(stack, base_model_of(model), model.config)
        holder = holder_in(model, stack)
        if holder is not None and holder.original is None:
            raise SwapStateError(
                f"This {type(model).__name__} was loaded already swapped, and its own position table is not in the checkpoint. Load the "
                "model it was made from instead, or swap it to another scheme."
            )
    return leaving


def put_back(model: PreTrainedModel, leaving: list[Stack]) -> None:
    """Put the own positions of some stacks back, and the configuration that says so."""
    if not leaving:
        return
    family = family_for(model)
    swapped = {
        stack.name: holder
        for stack in family.stacks_in(family.base_model(model), model.config)
        if (holder := holder_in(model, stack)) is not None
    }
    staying = {name: holder for name, holder in swapped.items() if name not in {stack.name for stack in leaving}}
    configs = {}
    for config in own_configs(model):
        configs[id(config)] = swapped_config(family, config, staying, {}) if staying else config.unswapped()
    for stack in leaving:
        original = swapped[stack.name].original
        assert original is not None
        detach(stack, base_model_of(model), model.config, swapped[stack.name])
        original.module.train(model.training)
        model.loss_type = original.loss_type
    set_configs(model, configs)
    if not staying:
        model.name_or_path = model.config.name_or_path
