"""What a swap asks for, checked before anything is built, and what of it is saved.

A assignment is what `config.json` holds under `pe_swap`: schemes with their options, which layer has which, which one acts
on the input. It comes from a caller or from a file that somebody else wrote, so every value is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pe_swap.errors import CheckpointError, LayerError, OptionError, UnsupportedModelError
from pe_swap.schemes import SCHEMES, Scheme, SchemeOptions, build_options
from pe_swap.schemes.base import INPUT_HOOKS, hooks_of, inside_attention, on_a_grid, two_sided
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.per_axis import built, resolved

FORMAT = 1
"""Version of the saved form. A larger one was written by a newer pe_swap."""

TO_BE_MATCHED = "match"
"""The value of an option that a swap computes from the model's own table, which a saved model no longer has."""

LONGEST_TEXT = 600
"""Characters: how much of an option's own error a message quotes; the value in it may be as long as the file."""


@dataclass(frozen=True)
class Assignment:
    """Which scheme acts where: the one form of it, in a model and in its `config.json`.

    Attributes:
        options: the options of each scheme; their class names the scheme.
        layers: for each layer, an index into `options`, or None where the layer has no scheme of ours.
        input: index of the scheme that acts on the input, or None.
    """

    options: tuple[SchemeOptions, ...]
    layers: tuple[int | None, ...]
    input: int | None

    def served_by(self, index: int) -> tuple[int, ...]:
        """Return the layers that a scheme serves."""
        return tuple(layer for layer, at in enumerate(self.layers) if at == index)

    def resolve(self, geometry: Geometry, natives: Sequence[Native]) -> tuple[Assignment, tuple[int, ...]]:
        """Return the assignment with options that depend on the model written out; see `SchemeOptions.resolve`.

        Where the model's own positions differ from layer to layer (two bases, say), a scheme becomes one per set of values.

        Args:
            geometry: the sizes of the stack.
            natives: the model's own positions, per layer.

        Returns:
            The assignment, and for each of its schemes the index that it had.

        Raises:
            OptionError: options that do not fit the model.
            UnsupportedModelError: a scheme of one dimension for images.
        """
        written_out: list[SchemeOptions] = []
        origins: list[int] = []
        layers: list[int | None] = [None] * len(self.layers)
        acting_on_input = None
        for index, options in enumerate(self.options):
            require_grid(options, geometry)
            first = len(written_out)
            for layer in self.served_by(index) or (0,):
                found = resolved(options, SCHEMES[options.scheme].on_a_grid, geometry, natives[layer])
                at = next((at for at in range(first, len(written_out)) if written_out[at] == found), len(written_out))
                if at == len(written_out):
                    written_out.append(found)
                    origins.append(index)
                if self.layers[layer] == index:
                    layers[layer] = at
            if index == self.input:
                acting_on_input = first
        return Assignment(tuple(written_out), tuple(layers), acting_on_input), tuple(origins)

    def build(self, geometry: Geometry) -> list[Scheme]:
        """Build every scheme.

        Raises:
            OptionError: options that do not fit the model.
            UnsupportedModelError: a causal scheme for an encoder.
        """
        schemes = []
        for index, options in enumerate(self.options):
            scheme_class = SCHEMES[options.scheme]
            if scheme_class.causal_only and not geometry.is_causal:
                raise UnsupportedModelError(
                    f"The scheme '{options.scheme}' is defined for causal attention only, and this model is an encoder. "
                    f"Use a scheme with a two-sided form ({', '.join(two_sided())}), or a decoder."
                )
            schemes.append(built(scheme_class, options, geometry, self.served_by(index)))
        return schemes

    def to_saved(self) -> dict[str, Any]:
        """Return schemes, options and layers as plain values: all a reload needs besides the weights."""
        return {
            "schemes": [{"name": options.scheme, "options": options.to_dict()} for options in self.options],
            "layers": list(self.layers),
            "input": self.input,
        }


def require_grid(options: SchemeOptions, geometry: Geometry) -> None:
    """Refuse a scheme of one dimension where positions are rows and columns.

    Raises:
        UnsupportedModelError: it is one.
    """
    if geometry.sides and SCHEMES[options.scheme].on_a_grid is None:
        raise UnsupportedModelError(
            f"The scheme '{options.scheme}' is defined along one axis, and the positions of this model are the rows and columns of "
            f"patches. Choose one of list_schemes(axes=2): {', '.join(on_a_grid())}."
        )


def options_from(scheme: str | SchemeOptions | Scheme | None, options: Mapping[str, Any]) -> SchemeOptions:
    """Return the checked options of a scheme given by name, by options, or as a built scheme.

    Raises:
        UnknownNameError: no scheme has that name.
        OptionError: an option that does not exist, breaks its rule, or comes beside an object that holds its own.
    """
    if isinstance(scheme, str):
        return build_options(SCHEMES[scheme].Options, options)
    if isinstance(scheme, Scheme):
        scheme = scheme.options
    if not isinstance(scheme, SchemeOptions):
        raise OptionError(
            f"scheme is {scheme!r}; it must be a name ({', '.join(SCHEMES.names())}), the options of a scheme "
            "(AlibiOptions(...)), or a scheme."
        )
    if options:
        raise OptionError(
            f"{scheme.scheme}: options {sorted(options)} were given beside an object that holds its own. Put them into the object."
        )
    return scheme


def starting_from_table() -> list[str]:
    """Return the names of the schemes that start from a model's own position table."""
    return [name for name in SCHEMES.names() if SCHEMES[name].starts_from_table]


def checked_layers(layers: object, num_layers: int) -> tuple[int, ...]:
    """Return the layers named by a caller, sorted; negative ones count from the end.

    Raises:
        LayerError: not integers, none at all, or out of range.
    """
    indices = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes, Mapping)) else None
    if not indices or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in indices):
        raise LayerError(
            f"layers is {layers!r}; it must be a non-empty list of layer indices (integers), or None for every layer."
        )
    for layer in indices:
        if not -num_layers <= layer < num_layers:
            raise LayerError(
                f"layers names layer {layer}, but the model has {num_layers}; it must be from 0 to {num_layers - 1} "
                f"(or -{num_layers} to -1, from the end)."
            )
    return tuple(sorted({layer % num_layers for layer in indices}))


def extend(
    current: Assignment | None, options: SchemeOptions, layers: object, num_layers: int
) -> tuple[Assignment, tuple[int | None, ...]]:
    """Return the assignment after a swap to `options`, in some layers or in all.

    Args:
        current: what the stack has now; None where it is not swapped.
        options: the new scheme.
        layers: the layers that take it, or None for every layer. The others keep what they have.
        num_layers: layers of the stack.

    Returns:
        The assignment, and for each of its schemes the index it has in `current`, or None for the new one.

    Raises:
        LayerError: layers out of range, or given for a scheme that acts on the input, which all layers share.
    """
    acts_on_input = bool(INPUT_HOOKS & hooks_of(SCHEMES[options.scheme]))
    if layers is None:
        return Assignment((options,), (0,) * num_layers, 0), (None,)
    chosen = checked_layers(layers, num_layers)
    if acts_on_input:
        raise LayerError(
            f"layers is {list(chosen)}, but the scheme '{options.scheme}' acts on the input embeddings, which all layers share. "
            f"Swap it without layers; then give some layers a scheme that acts inside attention ({', '.join(inside_attention())})."
        )
    before = current or Assignment((), (None,) * num_layers, None)
    assignment = tuple(len(before.options) if layer in chosen else at for layer, at in enumerate(before.layers))
    acting_on_input = before.input
    if acting_on_input is not None and not INPUT_HOOKS & hooks_of(SCHEMES[before.options[acting_on_input].scheme]):
        acting_on_input = None
    used = sorted({at for at in (*assignment, acting_on_input) if at is not None})
    renumbered = {old: new for new, old in enumerate(used)}
    everything = (*before.options, options)
    extended = Assignment(
        tuple(everything[old] for old in used),
        tuple(None if at is None else renumbered[at] for at in assignment),
        None if acting_on_input is None else renumbered[acting_on_input],
    )
    return extended, tuple(old if old < len(before.options) else None for old in used)


def from_saved(saved: object, num_layers: int) -> Assignment:
    """Read the assignment of one stack out of `config.json`, whose format was checked.

    Raises:
        CheckpointError: it is not one, was written by a newer pe_swap, or does not fit the model.
    """
    if not isinstance(saved, Mapping):
        raise _unreadable(f"'pe_swap' is {short(saved)}; it must be an object")
    schemes, layers, acting_on_input = saved.get("schemes"), saved.get("layers"), saved.get("input")
    if not isinstance(schemes, list) or len(schemes) > num_layers + 1:
        raise _unreadable(f"'pe_swap.schemes' is {short(schemes)}; it must be a list of at most {num_layers + 1} schemes")
    options = tuple(_options_from_saved(entry) for entry in schemes)
    if not isinstance(layers, list) or len(layers) != num_layers or not all(_is_index(at, len(options)) for at in layers):
        raise _unreadable(
            f"'pe_swap.layers' is {short(layers)}; it must be a list of {num_layers} entries, one a layer, each null or an index "
            f"below {len(options)}"
        )
    if not _is_index(acting_on_input, len(options)):
        raise _unreadable(f"'pe_swap.input' is {short(acting_on_input)}; it must be null or an index below {len(options)}")
    return Assignment(options, tuple(layers), acting_on_input)


def saved_stacks(saved: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return what `config.json` says of each swapped stack, by the stack's name: under `stacks`, or at once where a family has one.

    Raises:
        CheckpointError: it is no such object.
    """
    stacks = saved.get("stacks", {"": saved})
    if not isinstance(stacks, Mapping) or not all(isinstance(entry, Mapping) for entry in stacks.values()):
        raise _unreadable(f"'pe_swap.stacks' is {short(stacks)}; it must be an object with one object per stack")
    return stacks


def checked_format(saved: object) -> Mapping[str, Any]:
    """Return what `config.json` holds under `pe_swap`, if it is in a form that this pe_swap reads.

    Raises:
        CheckpointError: it is not an object, names no format, or was written by a newer pe_swap.
    """
    if not isinstance(saved, Mapping):
        raise _unreadable(f"'pe_swap' is {short(saved)}; it must be an object")
    version = saved.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _unreadable(f"'pe_swap.format' is {short(version)}; it must be a positive integer")
    if version > FORMAT:
        raise CheckpointError(
            f"This model was saved by a newer pe_swap ({short(saved.get('version'))}, format {version}); this one reads formats up "
            f"to {FORMAT}. Upgrade: pip install --upgrade pe-swap."
        )
    return saved


def _options_from_saved(entry: object) -> SchemeOptions:
    """Read one scheme's name and options."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not isinstance(entry.get("options"), Mapping):
        raise _unreadable(f"'pe_swap.schemes' holds {short(entry)}; an entry must be an object with 'name' and 'options'")
    try:
        options = options_from(entry["name"], entry["options"])
    except (OptionError, ValueError, TypeError) as error:
        text = str(error).rstrip(".")
        raise _unreadable(text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}...") from error
    for option, value in vars(options).items():
        if isinstance(value, str) and value == TO_BE_MATCHED:
            raise _unreadable(
                f"{options.scheme}: option '{option}' is '{TO_BE_MATCHED}', or is missing, where a swap writes the number that it found"
            )
    return options


def _is_index(value: object, length: int) -> bool:
    """Tell whether a saved value is null or an index below `length`."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < length)


def short(value: object) -> str:
    """Return a value as text that fits a message."""
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def _unreadable(what: str) -> CheckpointError:
    """Build the error for a saved assignment that cannot be used."""
    return CheckpointError(
        f"The saved model's config.json cannot be used: {what}. Save the model again with save_pretrained, or fix the file."
    )
