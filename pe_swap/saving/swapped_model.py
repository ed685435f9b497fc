"""The model classes of loaded swapped models: built around their schemes, and refused where weights are missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError
from torch import nn

from pe_swap.assignment import checked_format, from_saved, saved_stacks, short
from pe_swap.errors import CheckpointError
from pe_swap.families import FAMILIES, Family, Stack, family_name, known_loss_type
from pe_swap.families.base import NO_LIMIT
from pe_swap.patching.holder import Original
from pe_swap.patching.install import assemble, attach, attention_hooks, token_table
from pe_swap.saving.swapped_config import require_entry, rope_parameters_of
from pe_swap.schemes.geometry import Native


class SwappedModel:
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
        with _lengths(config, family.stacks_of(unswapped), entries, unswapped):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        base_model = self.base_model
        for stack in stacks:
            kind, original, module = stack.native, None, None
            if kind.keeps_layers:
                module = kind.require_native(base_model)
                assert module is not None
                if hasattr(module, "config"):
                    module.config = unswapped
                dtype = token_table(stack, base_model).weight.dtype
                original = Original(module, dtype, entries[stack.name]["length"], getattr(self, "loss_type", None), unswapped)
            geometry = stack.geometry(base_model, unswapped, entries[stack.name]["trained_length"])
            natives = [Native(options=kind.options(unswapped, layer, module)) for layer in range(geometry.num_layers)]
            assignment, _ = assignments[stack.name].resolve(geometry, natives)
            schemes = assignment.build(geometry)
            holder = assemble(stack, base_model, unswapped, assignment, schemes, original)
            if beside_old_table:
                holder.weight = None
            kept, holder.kept = holder.kept, nn.ModuleDict()
            holder.to(holder.tokens.weight.dtype)
            holder.kept = kept
            attach(stack, base_model, unswapped, holder)
            # Told by the schemes, not by the file.
            entries[stack.name]["attention_hooks"] = sorted(attention_hooks(holder))
            entries[stack.name]["rope_parameters"] = rope_parameters_of(holder, unswapped)
        self.loss_type = known_loss_type(self)

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a saved swapped model; see the family's class.

        Raises:
            CheckpointError: positional weights are missing, superfluous or of another shape, or a file is damaged.
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
        _refuse_wrong_weights(cls, "not in the checkpoint", info["missing_keys"])
        _refuse_wrong_weights(cls, "of another shape", [entry[0] for entry in info["mismatched_keys"]])
        _refuse_wrong_weights(cls, "not in the scheme", info["unexpected_keys"])
        return (model, info) if output_loading_info else model

    def _move_missing_keys_from_meta_to_device(self: Any, missing_keys: Iterable[str], *args: Any, **kwargs: Any) -> None:
        """Refuse missing positional weights before transformers allocates them at the size that `config.json` names.

        A method of transformers' own, called by its loading; without it the same refusal comes later, in `from_pretrained`.
        """
        _refuse_wrong_weights(type(self), "not in the checkpoint, or of another shape", missing_keys)
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)  # type: ignore[misc]


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


def _refuse_wrong_weights(model_class: Any, what: str, keys: Iterable[str]) -> None:
    """Refuse a checkpoint if any of `keys`, which are wrong in some way, is a positional weight.

    Raises:
        CheckpointError: one is.
    """
    paths = [stack.native.holder_path for stack in FAMILIES[family_name(model_class.config_class.model_type)].stacks]
    stand_ins = tuple(f".{path}.weight" for path in paths)  # families may leave tables out of what they save (Marian)
    wrong = sorted(key for key in keys if any(f".{path}." in f".{key}." for path in paths) and not f".{key}".endswith(stand_ins))
    if wrong:
        listed = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(
            f"The checkpoint's positional weights do not fit the scheme in its config.json ({what}: {listed}). Loading it would give a "
            "model with wrong positions. Save the model again with save_pretrained, or load the folder it was made from."
        )


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
