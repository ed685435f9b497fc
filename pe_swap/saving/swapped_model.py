"""The model classes of loaded swapped models: built around their schemes, and refused where weights are missing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pe_swap.assignment import checked_format, from_saved, saved_stacks, short
from pe_swap.errors import CheckpointError
from pe_swap.families import FAMILIES, Family, Stack, described, family_name, known_loss_type
from pe_swap.families.base import NO_LIMIT
from pe_swap.patching.holder import Original, SchemeHolder, trained_together
from pe_swap.patching.install import assemble, attach, attention_hooks, token_table
from pe_swap.patching.split_heads import require_whole_heads_in
from pe_swap.saving.auto_classes import CLASS_PREFIX
from pe_swap.saving.swapped_config import BUILDING, require_entry, rope_parameters_of
from pe_swap.schemes.geometry import Geometry, Native


class LoadedModel:
    """What the classes of loaded swapped models and of composites share: a weight that is missing or left over is an error."""

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a saved swapped model; see the family's class.

        Raises:
            CheckpointError: weights are missing or superfluous, positional ones are of another shape, or a file is damaged. Where another
                head is loaded than was saved, the weights of the one are missing and those of the other superfluous, as they should
                be; transformers reports them.
            UnsupportedModelError: heads are split over processes (`tp_plan`), and a scheme acts on all of them.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise CheckpointError(
                "use_safetensors is False, but swapped models are saved as safetensors only: pickled weights can run code. Leave the "
                "argument out."
            )
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                *args, output_loading_info=True, use_safetensors=True, **kwargs
            )
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in '{args[0] if args else kwargs.get('pretrained_model_name_or_path')}' cannot be read: {error}. A file is "
                "damaged or was cut short; copy or download the folder again."
            ) from error
        except RuntimeError as error:
            # transformers reports the loading in a `finally`, and may raise there over the error that was on its way.
            if isinstance(error.__context__, CheckpointError):
                raise error.__context__ from None
            raise
        require_whole_heads_in(model)
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
        _require_positional_weights(model, "not in the checkpoint", missing)
        _require_positional_weights(model, "of another shape", [entry[0] for entry in info["mismatched_keys"]])
        _require_positional_weights(model, "not in the scheme", unexpected)
        # Of a checkpoint with its old table, that table is left over.
        _require_weights_of_the_saved_class(model, missing, set() if kwargs.get("beside_old_table") else unexpected)
        return (model, info) if output_loading_info else model

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say that weights are initialised by transformers' own code, as they are.

        A method of transformers' own. For classes outside its package it takes a module without weights of its own for initialised, and
        would leave buffers as they were allocated that a family computes at such a module (Falcon-H1).
        """
        return False

    def _move_missing_keys_from_meta_to_device(self: Any, missing_keys: Iterable[str], *args: Any, **kwargs: Any) -> None:
        """Refuse missing positional weights before transformers allocates them at the size that `config.json` names.

        A method of transformers' own, called by its loading; without it the same refusal comes later, in `from_pretrained`.
        """
        missing_keys = list(missing_keys)
        _require_same_base_name(self, missing_keys)
        _require_positional_weights(self, "not in the checkpoint, or of another shape", missing_keys)
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)  # type: ignore[misc]


class SwappedModel(LoadedModel):
    """What the classes of loaded swapped models do beyond their family's; mixed in before the family's class."""

    def __init__(self: Any, config: Any, *args: Any, beside_old_table: bool = False, **kwargs: Any) -> None:
        """Build the model around its schemes; the family's table is never built at its real size.

        Args:
            config: the swapped configuration.
            args: as the family's class.
            beside_old_table: the checkpoint still has the table's weight, so nothing may stand under its name; see
                `pe_swap.saving.relative_key_bert`.
            kwargs: as the family's class.
        """
        family: Family = FAMILIES[family_name(type(config).model_type)]
        entries: dict[str, Any] = dict(saved_stacks(checked_format(getattr(config, "pe_swap", None))))
        unswapped = config.unswapped()
        stacks = [stack for stack in family.stacks_of(config) if stack.name in entries]
        for stack in stacks:
            require_entry(entries[stack.name])
            _require_same_causality(entries[stack.name], stack.is_causal(unswapped))
        assignments = {stack.name: from_saved(entries[stack.name], len(stack.paths(unswapped))) for stack in stacks}
        with _lengths(config, family.stacks_of(unswapped), entries, unswapped), _building():
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        config._attn_implementation_internal = (
            config._attn_implementation_internal
        )  # ours again, where it was the library's to build
        base_model = family.base_model(self)
        present = family.stacks_in(base_model, config)  # an encoder alone, from the folder of the whole (T5EncoderModel)
        for stack in (stack for stack in stacks if stack in present):
            if _is_swapped(base_model, stack):  # a head that built its base model from the same configuration
                continue
            kind, original, module = stack.native, None, None
            if kind.keeps_layers:
                module = kind.require_native(base_model)
                assert module is not None
                if hasattr(module, "config"):
                    module.config = unswapped
                weight, length = token_table(stack, base_model).weight, entries[stack.name]["length"]
                loss_type = getattr(self, "loss_type", None)
                original = Original(module, weight.dtype, length, loss_type, unswapped, trained_together(module, weight))
            geometry = stack.geometry(base_model, unswapped, entries[stack.name]["trained_length"])
            natives = [Native(options=kind.options(unswapped, layer, module)) for layer in range(geometry.num_layers)]
            assignment, _ = assignments[stack.name].resolve(geometry, natives)
            schemes = assignment.build(geometry)
            mean = _empty_mean(entries[stack.name], stack, geometry)
            prefix = stack.native.empty_prefix(geometry.input_size)
            holder = assemble(stack, base_model, unswapped, assignment, schemes, original, mean, prefix)
            if beside_old_table:
                holder.weight = None
            kept, holder.kept = holder.kept, nn.ModuleDict()
            holder.to(holder.tokens.weight.dtype)
            holder.kept = kept
            attach(stack, base_model, unswapped, holder)
            # From the schemes, not from the file.
            entries[stack.name]["attention_hooks"] = sorted(attention_hooks(holder))
            entries[stack.name]["rope_parameters"] = rope_parameters_of(holder, unswapped)
        self.loss_type = known_loss_type(self)


def _empty_mean(entry: Mapping[str, Any], stack: Stack, geometry: Geometry) -> Tensor | None:
    """Return room for the mean row of the table, where the file says that it was kept.

    Raises:
        CheckpointError: it says so of a model that has no table.
    """
    if "keep_mean" not in entry:
        return None
    if stack.native.kind not in ("table", "grid"):
        raise CheckpointError(
            "config.json: 'pe_swap.keep_mean' is true, and a model of this family has no position table. Save the model again with "
            "save_pretrained, or fix the file."
        )
    return torch.zeros(geometry.input_size)


@contextmanager
def _building() -> Iterator[None]:
    """Let the family's own classes be built from the swapped configuration."""
    token = BUILDING.set(True)
    try:
        yield
    finally:
        BUILDING.reset(token)


def _is_swapped(base_model: nn.Module, stack: Stack) -> bool:
    """Tell whether a stack has its schemes already."""
    try:
        return isinstance(base_model.get_submodule(stack.native.holder_path), SchemeHolder)
    except AttributeError:
        return False


@contextmanager
def _lengths(config: Any, stacks: Iterable[Stack], entries: Mapping[str, Any], unswapped: Any) -> Iterator[None]:
    """Let length fields say what the family's class should build, for as long as it builds.

    A table that is replaced at once has one row; a stack that is not swapped has what it had, also where both share a field.
    """
    wanted: dict[str, int] = {}
    for stack in stacks:
        if stack.length_field is not None:
            own = getattr(unswapped, stack.length_field)
            length = stack.native.length_to_build(unswapped) if stack.name in entries else own
            if stack.name in entries and stack.no_limit < NO_LIMIT:
                length = getattr(config, stack.length_field)  # what the family allocates by it is filled by it later
            wanted[stack.length_field] = max(wanted.get(stack.length_field, 0), length or own)
    before = {field: getattr(config, field) for field in wanted}
    for field, length in wanted.items():
        setattr(config, field, length)
    try:
        yield
    finally:
        for field, length in before.items():
            setattr(config, field, length)


def _stacks(config: Any) -> list[Stack]:
    """Return the stacks that a swapped configuration may say something of: of a composite, those of its swapped parts."""
    family = described(config.model_type)
    if isinstance(family, Family):
        return list(family.stacks)
    return [stack for inside in family.swapped_parts(config).values() for stack in _stacks(inside)]


def _unswapped_parts(config: Any) -> list[str]:
    """Return where a composite's other models are, whose tables may have the name of a swapped part's (CLIP)."""
    family = described(config.model_type)
    return (
        []
        if isinstance(family, Family)
        else [part.path for part in family.parts if part.name not in family.swapped_parts(config)]
    )


def _require_positional_weights(model: Any, what: str, keys: Iterable[str]) -> None:
    """Refuse a checkpoint if any of `keys`, which are wrong in some way, is a positional weight.

    Raises:
        CheckpointError: one is.
    """
    paths = [stack.native.holder_path for stack in _stacks(model.config)]
    others = [f".{path}." for path in _unswapped_parts(model.config)]
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # tables that a family computes (Marian)
    wrong = sorted(
        key
        for key in keys
        if any(f".{path}." in f".{key}." for path in paths)
        and not any(path in f".{key}." for path in others)
        and key not in unsaved
    )
    if wrong:
        raise CheckpointError(
            f"The checkpoint's positional weights do not fit the scheme in its config.json ({what}: {_listed(wrong)}). Loading it would "
            "give a model with wrong positions. Save the model again with save_pretrained, or load the folder it was made from."
        )


def _require_same_base_name(model: Any, missing: Iterable[str]) -> None:
    """Refuse a class that keeps its base model under another name than the class that was saved: none of its weights would be found.

    Transformers has one such head, that of question answering in Llama and its like, and draws all weights of it at random.

    Raises:
        CheckpointError: it does, and weights of the base model are missing.
    """
    saved_class = _saved_class(model)
    here, there = model.base_model_prefix, saved_class.base_model_prefix
    if here and there and here != there and any(key.startswith(f"{here}.") for key in missing):
        raise CheckpointError(
            f"{type(model).__name__} has its base model as '{here}', and the {saved_class.__name__} that was saved has it as '{there}': "
            "all weights would be drawn at random, as for a model that is not swapped. Load the saved class, build this one with "
            f"from_config, and copy: model.{here}.load_state_dict(saved.{there}.state_dict())."
        )


def _require_weights_of_the_saved_class(model: Any, missing: set[str], unexpected: set[str]) -> None:
    """Refuse a checkpoint that lacks a weight of the class which `architectures` says was saved, or has one that it has not.

    A weight that is missing is drawn at random by transformers, with a report and no error. That is wanted for a new head, and for
    nothing else.

    Args:
        model: the loaded model.
        missing: names of its weights that were not in the checkpoint.
        unexpected: names of weights in the checkpoint that it does not have.

    Raises:
        CheckpointError: there is such a weight.
    """
    if not missing and not unexpected:
        return
    saved_class = _saved_class(model)
    if saved_class is not type(model):
        with torch.device("meta"):
            saved_model = saved_class(copy.deepcopy(model.config))
        saved = {_name_in_base_model(saved_model, name) for name in saved_model.state_dict()}
        missing = {name for name in missing if _name_in_base_model(model, name) in saved}
        unexpected = {name for name in unexpected if not _is_one_of(saved, _name_in_base_model(saved_model, name))}
    name = saved_class.__name__
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks weights of the {name} that its config.json names: {_listed(missing)}. They would be drawn at random; "
            "save the model again with save_pretrained, or give the argument that builds it without them (add_pooling_layer=False)."
        )
    if unexpected:
        raise CheckpointError(
            f"The checkpoint has weights that the {name} which its config.json names has not: {_listed(unexpected)}. They would be "
            "dropped; save the model again with save_pretrained, or load the folder it was made from."
        )


def _saved_class(model: Any) -> Any:
    """Return the class that a model's configuration says was saved; the model's own where it says none that is known."""
    names = model.config.architectures
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(sys.modules[type(model).__module__], name, None) if name.startswith(CLASS_PREFIX) else None
    return found if isinstance(found, type) and issubclass(found, LoadedModel) else type(model)


def _name_in_base_model(model: Any, name: str) -> str:
    """Return a weight's name as the base model has it, so that those of two heads compare; a head's own weights keep their names."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _is_one_of(saved: set[str], name: str) -> bool:
    """Tell whether a weight is one of the saved class; a file may have it under another path before that name (a LLaVA's head)."""
    return name in saved or any(name.endswith(f".{own}") for own in saved if "." in own)


def _listed(names: Iterable[str]) -> str:
    """Return the first of many names as text."""
    wrong = sorted(names)
    return ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")


def _require_same_causality(saved: Any, is_causal: bool) -> None:
    """Refuse a configuration whose attention looks where it did not at the swap: the same weights would mean other positions.

    Raises:
        CheckpointError: it does, or it is not said.
    """
    swapped_as = saved.get("is_causal")
    if not isinstance(swapped_as, bool):
        raise CheckpointError(f"config.json: 'pe_swap.is_causal' is {short(swapped_as)}; it must be true or false.")
    if swapped_as != is_causal:
        kinds = {True: "a decoder (causal attention)", False: "an encoder (two-sided attention)"}
        raise CheckpointError(
            f"This model was swapped as {kinds[swapped_as]} and is being built as {kinds[is_causal]}, where its positional weights would "
            "mean something else. Load it as it was saved; or build the other kind from the unswapped model, and swap that."
        )
