"""Rotary position embedding, and its scalings for longer input.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021, arXiv:2104.09864), equation 34: queries and keys
are turned by `position * theta_k` in each of `head_dim / 2` planes, `theta_k = base ** (-2k / head_dim)`, so that their product
depends on the difference of positions. The turning itself is in `rotary.py`.

Differs from the paper: which dimensions share a plane is a matter of layout. `interleaved` is the paper's (2k with 2k + 1; GPT-J,
RoFormer), `half` pairs k with k + head_dim / 2 (GPT-NeoX, Llama). They are equal up to a permutation of the projections' rows.
`fraction` turns the first dimensions only, as GPT-J and GPT-NeoX do, with the turned dimensions in place of `head_dim` in theta.

`rope_type` scales the frequencies. Names, options and meanings are those of transformers' `rope_parameters`, whose functions are used.
Its spellings are taken too (`rope_theta` is `base`, `partial_rotary_factor` is `fraction`, `type` is `rope_type`), so that
`swap_positional(model, "rope", **config.rope_parameters)` means what the configuration means:

* `linear`: `theta / factor` (position interpolation; Chen et al., arXiv:2306.15595).
* `ntk`: `base * factor ** (dim / (dim - 2))`, whatever the length (bloc97, "NTK-Aware Scaled RoPE", 2023; Peng et al.,
  arXiv:2309.00071, section 3.1). transformers has none.
* `dynamic`: the same, with `factor * length / L - (factor - 1)` for the factor once the length exceeds L
  (arXiv:2309.00071, section 3.3).
* `yarn`: planes that turn fast keep theta, slow ones get `theta / factor`, and scores are sharpened (arXiv:2309.00071, sections
  3.2 and 3.4). Between them the ramp runs over the planes' indices, as in the authors' code; the paper's runs over turns.
* `llama3`: the same idea, by wavelength (Llama 3.1).
* `longrope`: a divisor for each plane, one list up to the length L and one beyond (Ding et al., arXiv:2402.13753).
* `proportional`: only the `fraction` of planes that turn fastest do, with theta of the whole head (p-RoPE; Barbero et al.,
  arXiv:2410.06205, section 6).

`planes` lets only some planes turn, and leaves the others as they are without positions: a first step from a rotary model to one without
(Ji et al., "MHA2MLA", ACL 2025, arXiv:2502.14837, section 3.1). Differs from the paper: the same planes in every layer and head.

Differs from transformers: the length of `dynamic` and `longrope` is that of each token's own sequence, not of the longest in the
batch, so that a sequence whose position ids are given does not depend on its neighbours; and their keys are cached before they are
turned, so that a step turns its query and all its keys by the same frequencies, where transformers mixes those of every step so far.
Beyond the first layer a cached pass still differs from an uncached one, as earlier hidden states were computed with earlier frequencies:
`cached_equals_uncached` is False. Every step turns all keys again. The first tokens, which LongRoPE leaves unscaled, are not treated
apart; transformers does not either.

On a grid of rows and columns a plane turns by one axis (`RotaryScheme`), each axis with the same frequencies. With
`frequencies="alternating"` the axes take the frequencies of the whole head in turn, the fastest for rows (Agrawal et al., "Pixtral 12B",
arXiv:2410.07073; as in transformers' `PixtralVisionRotaryEmbedding`). With `frequencies="mixed"` a plane turns by both axes: `angle = row *
f_row + column * f_column`, with trained frequencies of each plane, head and layer (RoPE-Mixed; Heo et al., ECCV 2024, arXiv:2403.13298,
section 3.2). Differs from that paper: they start as the axial rotation, where the paper draws a direction at random for each head.

`python -m pe_swap show rope` draws it.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.hf_rope import RotaryConfig, transformers_frequencies
from pe_swap.schemes.options import LARGEST_LENGTH, is_integer, is_number, native_or, none_is
from pe_swap.schemes.parameters import layer_parameters, of_layer
from pe_swap.schemes.rotary import (
    LAYOUT_ON_A_GRID,
    ResolvedRotaryOptions,
    RotaryOptions,
    RotaryScheme,
    rotation_by,
    turn,
    turning_dimensions,
)
from pe_swap.schemes.sinusoids import inverse_frequencies

REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
"""What each rope type cannot do without."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "dynamic": ("original_max_position_embeddings",),
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("original_max_position_embeddings",),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
    "proportional": ("factor",),
}
"""What each rope type reads where it is given."""

SCALING = tuple(dict.fromkeys(name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names))
"""Every option that some rope type reads."""

ON_A_GRID = ("default", "linear", "ntk")
"""Rope types that need no trained length, so that they mean something along each axis of a grid."""

BASE_ON_A_GRID = 100.0
"""Base in images, whose sides are short: that of Heo et al. (2024), section 3.2, and of DINOv3."""

PLANES = ("high", "low", "uniform")
"""Rules for the planes that turn, by how fast they do."""

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types whose frequencies depend on how long a sequence is so far."""


def frequencies(
    options: ResolvedRopeOptions,
    head_dim: int,
    original_length: int,
    length: int | Tensor | None = None,
    device: torch.device | str = "cpu",
    axes: int = 1,
) -> tuple[Tensor, float]:
    """Return how fast each plane turns under the options.

    Args:
        options: the rope type and its parameters.
        head_dim: width of a head.
        original_length: the length that a scaling starts from, in positions.
        length: how long the sequence is so far, in positions, for the types that depend on it, also a tensor of lengths, `[..., 1]`; None
            for one no longer than `original_length`.
        device: where they are computed.
        axes: axes that share the planes equally; the frequencies are those of one.

    Returns:
        Radians per position, `[rotary_dim / 2]`, or `[..., rotary_dim / 2]` for a tensor of lengths, and the factor on sine and cosine.
        `default` and `ntk` are worked out in float64, the others in float32, as transformers' functions do.
    """
    turning = turning_dimensions("rope", head_dim, options.fraction, axes) // axes
    if options.rope_type == "default":
        return inverse_frequencies(turning, options.base, device), 1.0
    if options.rope_type == "ntk":
        stretched = options.base * (options.factor or 1.0) ** (turning / (turning - 2))
        return inverse_frequencies(turning, stretched, device), 1.0
    parameters = {"rope_type": options.rope_type, "rope_theta": options.base, "factor": 1.0, **options.scaling()}
    rotary_dim = turning
    if options.rope_type == "proportional":  # the planes that do not turn are among its frequencies, as zeros
        rotary_dim = head_dim
        parameters["partial_rotary_factor"] = (turning + 0.5) / head_dim  # which is then rounded down
    # their functions start from the default device; a compiled graph takes no such context, and is compiled for one device
    with nullcontext() if torch.compiler.is_compiling() else torch.device(device):
        return transformers_frequencies(RotaryConfig(parameters, rotary_dim, original_length), length, torch.device(device))


def sequence_lengths(position_ids: Tensor) -> Tensor:
    """Return how long each token's sequence is so far, `[batch or 1, length]`, int64: the highest position id of the sequence, plus one.

    A sequence ends where ids stop rising: at the end of a row, at padding, and where the next of several packed into a row begins. No
    value of a tensor is read on the way, so that a compiled graph stays whole.
    """
    length = position_ids.shape[-1]
    ends = F.pad(position_ids[:, 1:] <= position_ids[:, :-1], (0, 1), value=True)
    places = torch.arange(length, device=position_ids.device)
    end_of_each = torch.where(ends, places, length).flip(-1).cummin(-1).values.flip(-1)
    return position_ids.gather(-1, end_of_each) + 1


@dataclass(frozen=True)
class RopeOptions(RotaryOptions):
    """Options of `rope`, beside those of `RotaryOptions`. An option that the rope type does not read is refused.

    In a rotary model, options left out take that model's own values, so that `rope` alone is the model, and `factor` alone is the model
    extended. Naming `rope_type` starts its parameters afresh.

    Attributes:
        fraction: share of each head's dimensions that turn.
        rope_type: `"default"`, or a scaling of the frequencies, see above.
        factor: how many times longer than `original_max_position_embeddings` the input may be.
        original_max_position_embeddings: L, the trained length, in positions; None takes the model's.
        attention_factor: on sine and cosine, so that scores get its square; None works it out from `factor`.
        beta_fast: `yarn`: planes with more turns than this within L keep theta; None is 32.
        beta_slow: `yarn`: planes with fewer turns than this within L get `theta / factor`; None is 1.
        mscale: `yarn`: with `mscale_all_dim`, the attention factor as in DeepSeek.
        mscale_all_dim: see `mscale`.
        truncate: `yarn`: round the bounds of the ramp to whole planes; None is True.
        low_freq_factor: `llama3`: wavelengths above `L / low_freq_factor` are divided by `factor`.
        high_freq_factor: `llama3`: wavelengths below `L / high_freq_factor` stay.
        short_factor: `longrope`: divisors of theta up to the length L, one per plane.
        long_factor: `longrope`: divisors beyond it.
        coordinates: on a grid, `"index"`, row and column counted from 0, or `"centered"`, those of the patch's centre from -1 to 1, times
            2 pi (DINOv3; Simeoni et al., arXiv:2508.10104); None takes the model's, else `"index"`.
        planes: which planes turn: None is all; `"high"` the share `planes_share` that turns fastest, `"low"` the slowest, `"uniform"` every
            n-th; or indices, 0 being the fastest (on a grid, of each axis); `strongest_planes` of pe_swap/training/planes.py finds them.
        planes_share: see `planes`.
        frequencies: on a grid, how fast planes turn: None, by one axis each, both axes with the same frequencies; `"alternating"`, by one
            axis each, which take the frequencies of a whole head in turn; `"mixed"`, by both axes, with trained frequencies.
    """

    scheme: ClassVar[str] = "rope"

    fraction: float | None = field(default=None, metadata=native_or(1.0))
    rope_type: str | None = field(default=None, metadata=native_or("default"))
    factor: float | None = None
    original_max_position_embeddings: int | None = field(default=None, metadata=none_is("the trained length"))
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    coordinates: str | None = field(default=None, metadata=none_is("on a grid, the model's own or 'index'"))
    planes: str | tuple[int, ...] | None = None
    planes_share: float | None = None
    frequencies: str | None = field(default=None, metadata=none_is("each axis has the same"))

    def __post_init__(self) -> None:
        """Check the values; which of them the rope type reads, only where it is given."""
        super().__post_init__()
        self.require_number("fraction", 0.0, 1.0)
        self.require_choice("rope_type", tuple(REQUIRED))
        self.require_choice("coordinates", ("index", "centered"))
        self.require_choice("frequencies", ("alternating", "mixed"))
        if self.frequencies == "mixed" and self.planes is not None:
            raise self.refuse("planes", "None beside frequencies='mixed', which trains every plane. Leave one of them out")
        if self.rope_type is not None:
            self._require_what_is_read(self.rope_type)
        given = self.scaling()
        for option in given.keys() - {"original_max_position_embeddings", "truncate", "short_factor", "long_factor"}:
            self.require_number(option, 0.0, 1e6)
        if self.factor is not None and self.factor < 1:
            raise self.refuse("factor", "at least 1: input is at least as long as in training")
        if "truncate" in given:
            self.require_bool("truncate")
        self.require_int("original_max_position_embeddings", 2, LARGEST_LENGTH)
        for option in given.keys() & {"short_factor", "long_factor"}:
            object.__setattr__(self, option, self._divisors(option))
        self._require_order()
        self._require_planes()

    def _require_what_is_read(self, rope_type: str) -> None:
        """Refuse what is missing, and what the rope type does not read."""
        read = (*REQUIRED[rope_type], *OPTIONAL.get(rope_type, ()))
        for option, value in self.scaling().items():
            if option not in read:
                raise OptionError(
                    f"rope: option '{option}' is {value!r}, but rope_type '{rope_type}' does not read it; it reads "
                    f"{', '.join(read) or 'none of the scaling options'}. Leave it out, or choose another rope_type."
                )
        for option in REQUIRED[rope_type]:
            if getattr(self, option) is None:
                raise OptionError(
                    f"rope: rope_type '{rope_type}' needs the option '{option}', and it is not given. Give it: a model's "
                    "rope_parameters have it under this name."
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            given, missing = ("mscale", "mscale_all_dim") if self.mscale_all_dim is None else ("mscale_all_dim", "mscale")
            raise OptionError(
                f"rope: option '{given}' is {getattr(self, given)!r} and '{missing}' is not given, but they are read together or not at "
                "all. Give both, or neither."
            )
        if rope_type == "longrope" and self.factor is None and self.attention_factor is None:
            raise OptionError(
                "rope: rope_type 'longrope' needs the option 'factor', or 'attention_factor', which follows from it. Give one of them."
            )
        unread = {"longrope": "factor", "yarn": "mscale"}.get(rope_type)
        if unread is not None and getattr(self, unread) is not None and self.attention_factor is not None:
            raise OptionError(
                f"rope: options '{unread}' = {getattr(self, unread)!r} and 'attention_factor' = {self.attention_factor!r} are both "
                f"given, but rope_type '{rope_type}' reads '{unread}' only to work out 'attention_factor'. Leave one of them out."
            )

    def _require_planes(self) -> None:
        """Refuse what names no planes, and a share without a rule that takes one."""
        if isinstance(self.planes, str) or self.planes is None:
            self.require_choice("planes", (None, *PLANES))
        else:
            given = list(self.planes) if isinstance(self.planes, (list, tuple)) else []
            if not given or any(not is_integer(plane) or plane < 0 for plane in given) or len(set(given)) < len(given):
                raise self.refuse("planes", f"None, one of {', '.join(PLANES)}, or different indices of planes, from 0")
            object.__setattr__(self, "planes", tuple(sorted(given)))
        if isinstance(self.planes, str) == (self.planes_share is None):
            raise self.refuse(
                "planes_share", f"a number beside planes = {', '.join(map(repr, PLANES))}, and None beside anything else"
            )
        if self.planes_share is not None:
            self.require_number("planes_share", 0.0, 1.0)

    def turning_planes(self, number: int) -> tuple[int, ...] | None:
        """Return the indices of the planes that turn, of `number` planes, or None for all.

        Raises:
            OptionError: an index that is no plane of the model.
        """
        if self.planes is None:
            return None
        if isinstance(self.planes, str):
            kept = max(1, round(number * (self.planes_share or 0.0)))
            every = [index * number // kept for index in range(kept)]
            return tuple({"high": range(kept), "low": range(number - kept, number), "uniform": every}[self.planes])
        if self.planes[-1] >= number:
            raise self.refuse("planes", f"indices below {number}, the planes of each head of this model")
        return self.planes

    def _divisors(self, option: str) -> tuple[float, ...]:
        """Return a list of divisors as a tuple, checked."""
        values = getattr(self, option)
        if not isinstance(values, (list, tuple)) or not all(is_number(value) and 1e-6 <= value <= 1e12 for value in values):
            raise self.refuse(option, "a list of numbers from 1e-06 to 1e+12, one for each plane of two dimensions")
        return tuple(values)

    def _require_order(self) -> None:
        """Refuse bounds in the wrong order."""
        if (
            self.low_freq_factor is not None
            and self.high_freq_factor is not None
            and self.high_freq_factor <= self.low_freq_factor
        ):
            raise self.refuse("high_freq_factor", f"above low_freq_factor = {self.low_freq_factor}")
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise self.refuse("beta_fast", f"above beta_slow = {self.beta_slow or 1} (None is 32)")

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedRopeOptions:
        """Return the options with the model's own values, and the original length where the rope type reads it, written out."""
        values: dict[str, Any] = {}
        if geometry.sides:
            layout = "half" if self.frequencies == "alternating" else LAYOUT_ON_A_GRID  # Pixtral's, or that of Heo et al.
            values = {"base": BASE_ON_A_GRID, "layout": layout, "coordinates": native.options.get("coordinates", "index")}
        for option in () if geometry.sides else ("coordinates", "frequencies"):
            if getattr(self, option) is not None:
                raise OptionError(
                    f"rope: option '{option}' is {getattr(self, option)!r}, and this model's tokens stand in one row. Leave it out; it "
                    "is for images."
                )
        if self.rope_type is None:
            values |= {name: value for name, value in native.options.items() if name in SCALING}
        rope_type = self.rope_type or native.options.get("rope_type", "default")
        if "original_max_position_embeddings" in OPTIONAL.get(rope_type, ()):
            values.setdefault("original_max_position_embeddings", geometry.trained_length)
        written = self.written_out(ResolvedRopeOptions, native, **values)
        turning = turning_dimensions("rope", geometry.head_dim, written.fraction, geometry.axes)
        planes = self.turning_planes(turning // (2 * geometry.axes))
        return dataclasses.replace(written, planes=planes, planes_share=None)

    def scaling(self) -> dict[str, Any]:
        """Return the scaling options that are given, by their names in transformers' `rope_parameters`."""
        return {name: value for name in SCALING if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, without those that are not given."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in super().to_dict().items()
            if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class ResolvedRopeOptions(ResolvedRotaryOptions, RopeOptions):
    """`RopeOptions` as they are used and saved; the parameters of other rope types are None."""

    fraction: float
    rope_type: str


@SCHEMES.register("rope")
class Rope(RotaryScheme):
    """`query_i . key_j` with both turned by their positions: it depends on `i - j`.

    Start on a pretrained model: in a rotary model, that model's own rotation. Elsewhere none preserves the function, as projections
    trained without rotation get one. The scalings are for a model already trained with `rope`: swap to the same base and layout with a
    `rope_type`. Only mixed frequencies are parameters.
    """

    Options = RopeOptions
    summary = "queries and keys turned by their position"
    on_a_grid = "itself"

    options: ResolvedRopeOptions

    def __init__(self, options: ResolvedRopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Work out the frequencies.

        Raises:
            OptionError: dimensions that do not make whole planes, or lists that do not have one number per plane.
        """
        require_planes(options, geometry.head_dim, geometry.axes)
        original_length = options.original_max_position_embeddings or geometry.trained_length
        alternates = options.frequencies == "alternating"
        shared_by = 1 if alternates else geometry.axes
        inv_freq, attention_factor = frequencies(options, geometry.head_dim, original_length, axes=shared_by)
        if alternates:
            inv_freq = inv_freq.reshape(-1, geometry.axes).T  # a row per axis
        self._turns = [float(options.planes is None or plane in options.planes) for plane in range(inv_freq.shape[-1])]
        super().__init__(options, geometry, layers, self._of_turning(inv_freq), attention_factor)
        self.is_mixed = options.frequencies == "mixed"
        served = layers if self.is_mixed else ()
        self.mixed_frequencies = layer_parameters(served, geometry.axes, geometry.num_heads, self.rotary_dim // 2)
        self.reset_parameters()
        if options.rope_type in LENGTH_DEPENDENT:
            self.shift_invariant = self.caches_rotated_keys = self.cached_equals_uncached = False
        if options.rope_type == "longrope":
            long, _ = frequencies(options, geometry.head_dim, original_length, original_length + 1)
            self._long_inv_freq: list[float] = self._of_turning(long).tolist()

    @property
    def original_length(self) -> int:
        """The length that a scaling starts from, in positions; see `Scheme.original_length`."""
        return self.options.original_max_position_embeddings or self.geometry.trained_length

    def inv_freq(self, position_ids: Tensor) -> Tensor:
        """Return the frequencies that turn one call's queries or keys, radians per position, float32.

        Args:
            position_ids: `[batch or 1, length]`; for the keys of a step, those of all keys.

        Returns:
            `[rotary_dim / 2]`, or `[batch or 1, 1, length, rotary_dim / 2]` where they depend on how long a sequence is so far.
        """
        if self.options.rope_type not in LENGTH_DEPENDENT:
            return super().inv_freq(position_ids)
        length, device = sequence_lengths(position_ids)[:, None, :, None], position_ids.device
        if self.options.rope_type == "dynamic":
            return self._of_turning(frequencies(self.options, self.geometry.head_dim, self.original_length, length, device)[0])
        long = torch.tensor(self._long_inv_freq, dtype=torch.float32, device=device)
        return torch.where(length > self.original_length, long, super().inv_freq(position_ids))

    def coordinates(self, position_ids: Tensor, sides: tuple[int, ...]) -> Tensor:
        """Return row and column as the option says, `[batch or 1, length, axes]`, float32; see `RotaryScheme.coordinates`."""
        if self.options.coordinates != "centered":
            return super().coordinates(position_ids, sides)
        centers = (position_ids.float() + 0.5) / torch.tensor(sides, dtype=torch.float32, device=position_ids.device)
        return 2 * math.pi * (2.0 * centers - 1.0)

    def _of_turning(self, inv_freq: Tensor) -> Tensor:
        """Return frequencies, `[..., planes]`, with 0 for the planes that do not turn."""
        return inv_freq if all(self._turns) else inv_freq * torch.tensor(self._turns, device=inv_freq.device)

    def prepare_grid(self, position_ids: Tensor, sides: tuple[int, ...]) -> Any:
        """Return a rotation; or rows and columns, 0 for what stands nowhere, where layers have frequencies of their own."""
        if not self.is_mixed:
            return super().prepare_grid(position_ids, sides)
        return self.coordinates(position_ids, sides).masked_fill(position_ids < 0, 0.0)

    def transform_query_key(self, x: Tensor, prepared: Any, *, role: Literal["query", "key"], layer: int) -> Tensor:
        """Return `x` turned by its positions; see `Scheme.transform_query_key`."""
        if not self.is_mixed:
            return super().transform_query_key(x, prepared, role=role, layer=layer)
        # [batch or 1, 1, length, axes] by [heads, axes, planes]
        angles = prepared[:, None] @ of_layer(self.mixed_frequencies, layer).float().transpose(0, 1)
        return turn(x, rotation_by(angles, self.options.layout), self.options.layout)

    def reset_parameters(self) -> None:
        """Set mixed frequencies to those of the axial rotation: one axis has the first planes, the other the rest."""
        planes = len(self._inv_freq)
        with torch.no_grad():
            for parameter in self.mixed_frequencies.values():
                parameter.zero_()
                for axis, of_axis in enumerate(parameter):
                    of_axis[:, axis * planes : (axis + 1) * planes] = torch.tensor(self._inv_freq)

    def start_from(self, native: Native) -> None:
        """Note whether this is the model's own rotation; see `Scheme.start_from`."""
        self.keeps_function = "base" in native.options and self.options == RopeOptions().resolve(self.geometry, native)


def require_planes(options: ResolvedRopeOptions, head_dim: int, axes: int) -> None:
    """Refuse options that do not fit the number of planes, or the axes that share them."""
    turning = turning_dimensions("rope", head_dim, options.fraction, axes) // axes
    if axes > 1 and options.rope_type not in ON_A_GRID:
        raise OptionError(
            f"rope: rope_type '{options.rope_type}' depends on the length of a row of tokens, and this model's positions are rows and "
            f"columns of patches; it must be one of {', '.join(map(repr, ON_A_GRID))}."
        )
    if options.rope_type in ("dynamic", "ntk") and turning < 4:
        raise OptionError(
            f"rope: rope_type '{options.rope_type}' with {turning} rotary dimensions; it must have at least 4, as the fastest plane keeps "
            "its frequency. Choose a larger fraction, or rope_type 'linear'."
        )
    for option in ("short_factor", "long_factor"):
        divisors = getattr(options, option)
        if divisors is not None and len(divisors) != turning // 2:
            raise OptionError(
                f"rope: option '{option}' has {len(divisors)} numbers; it must have {turning // 2}, one for each plane of two dimensions "
                f"(head_dim {head_dim} x fraction {options.fraction})."
            )
