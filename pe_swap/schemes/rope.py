"""Rotary position embedding, and its scalings for longer input.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021, arXiv:2104.09864), equation 34: queries and keys
are turned by `position * theta_k` in each of `head_dim / 2` planes, `theta_k = base ** (-2k / head_dim)`, so that their product
depends on the difference of positions.

Differs from the paper: which dimensions share a plane is a matter of layout. `interleaved` is the paper's (2k with 2k + 1; GPT-J,
RoFormer), `half` pairs k with k + head_dim / 2 (GPT-NeoX, Llama). They are equal up to a permutation of the projections' rows.
`fraction` turns the first dimensions only, as GPT-J and GPT-NeoX do, with the turned dimensions in place of `head_dim` in theta.

`rope_type` scales the frequencies. Names, options and meanings are those of transformers' `rope_parameters`, whose functions are used
(`rope_theta` is `base`, `partial_rotary_factor` is `fraction`):

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

Differs from transformers: the length of `dynamic` and `longrope` is that of each token's own sequence, not of the longest in the
batch, so that a sequence whose position ids are given does not depend on its neighbours; and their keys are cached before they are
turned, so that a step turns its query and all its keys by the same frequencies, where transformers mixes those of every step so far.
Beyond the first layer a cached pass still differs from an uncached one, as earlier hidden states saw earlier frequencies:
`cached_equals_uncached` is False. Every step turns all keys again. The first tokens, which LongRoPE leaves unscaled, are not treated
apart; transformers does not either.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.hf_rope import RotaryConfig, transformers_frequencies
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions
from pe_swap.schemes.sinusoidal import inverse_frequencies

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

LARGE = 2**16
"""Numbers in a tensor from which on allocating its temporaries costs more than a few more calls (measured on a CPU)."""

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types whose frequencies depend on how long a sequence is so far."""


@dataclass(frozen=True)
class RopeOptions(SchemeOptions):
    """Options of `rope`. An option that the rope type does not read is refused.

    Attributes:
        base: the slowest plane turns by nearly `1 / base` radians a position.
        layout: `"half"` or `"interleaved"`: which dimensions share a plane.
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
        short_factor: `longrope`: divisors of theta up to the length L, one a plane.
        long_factor: `longrope`: divisors beyond it.
    """

    scheme: ClassVar[str] = "rope"

    base: float = 10000
    layout: str = "half"
    fraction: float = 1.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
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

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("base", 1.0, 1e12)
        self.require_choice("layout", ("half", "interleaved"))
        self.require_number("fraction", 0.0, 1.0)
        self.require_choice("rope_type", tuple(REQUIRED))
        self._check_presence()
        given = self.scaling()
        for option in given.keys() - {"original_max_position_embeddings", "truncate", "short_factor", "long_factor"}:
            self.require_number(option, 0.0, 1e6)
        if self.factor is not None and self.factor < 1:
            raise self.refuse("factor", "at least 1: input is at least as long as in training")
        if "truncate" in given:
            self.require_bool("truncate")
        self.require_int("original_max_position_embeddings", 2, LARGEST_LENGTH, none_is="the trained length")
        for option in given.keys() & {"short_factor", "long_factor"}:
            object.__setattr__(self, option, self._divisors(option))
        self._check_order()

    def _check_presence(self) -> None:
        """Refuse what is missing, and what the rope type does not read."""
        read = (*REQUIRED[self.rope_type], *OPTIONAL.get(self.rope_type, ()))
        for option, value in self.scaling().items():
            if option not in read:
                raise OptionError(
                    f"rope: option '{option}' is {value!r}, but rope_type '{self.rope_type}' does not read it; it reads "
                    f"{', '.join(read) or 'none of the scaling options'}. Leave it out, or choose another rope_type."
                )
        for option in REQUIRED[self.rope_type]:
            if getattr(self, option) is None:
                raise OptionError(
                    f"rope: rope_type '{self.rope_type}' needs the option '{option}', and it is not given. Give it: a model's "
                    "rope_parameters have it under this name. rope_type 'default' needs none."
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            given, missing = ("mscale", "mscale_all_dim") if self.mscale_all_dim is None else ("mscale_all_dim", "mscale")
            raise OptionError(
                f"rope: option '{given}' is {getattr(self, given)!r} and '{missing}' is not given, but they are read together or not at "
                "all. Give both, or neither."
            )
        if self.rope_type == "longrope" and self.factor is None and self.attention_factor is None:
            raise OptionError(
                "rope: rope_type 'longrope' needs the option 'factor', or 'attention_factor', which follows from it. Give one of them."
            )
        unread = {"longrope": "factor", "yarn": "mscale"}.get(self.rope_type)
        if unread is not None and getattr(self, unread) is not None and self.attention_factor is not None:
            raise OptionError(
                f"rope: options '{unread}' = {getattr(self, unread)!r} and 'attention_factor' = {self.attention_factor!r} are both "
                f"given, but rope_type '{self.rope_type}' reads '{unread}' only to work out 'attention_factor'. Leave one of them out."
            )

    def _divisors(self, option: str) -> tuple[float, ...]:
        """Return a list of divisors as a tuple, checked."""
        values = getattr(self, option)
        if not isinstance(values, (list, tuple)) or not all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-6 <= value <= 1e12 for value in values
        ):
            raise self.refuse(option, "a list of numbers from 1e-06 to 1e+12, one for each plane of two dimensions")
        return tuple(values)

    def _check_order(self) -> None:
        """Refuse bounds in the wrong order."""
        if (
            self.low_freq_factor is not None
            and self.high_freq_factor is not None
            and self.high_freq_factor <= self.low_freq_factor
        ):
            raise self.refuse("high_freq_factor", f"above low_freq_factor = {self.low_freq_factor}")
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise self.refuse("beta_fast", f"above beta_slow = {self.beta_slow or 1} (None is 32)")

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> RopeOptions:
        """Return the options with the original length written out, where the rope type reads it."""
        reads_length = "original_max_position_embeddings" in OPTIONAL.get(self.rope_type, ())
        if not reads_length or self.original_max_position_embeddings is not None:
            return self
        return replace(self, original_max_position_embeddings=geometry.trained_length)

    def scaling(self) -> dict[str, Any]:
        """Return the scaling options that are given, by their names in transformers' `rope_parameters`."""
        own = {"base", "layout", "fraction", "rope_type", "logit_scale"}
        names = [field.name for field in dataclasses.fields(self) if field.name not in own]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, without those that are not given."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in super().to_dict().items()
            if value is not None
        }


def rotation_by(angles: Tensor, layout: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return what turns a vector by `angles`: for each dimension the factor on itself, and on its partner in the plane.

    Args:
        angles: of each plane, radians, `[batch or 1, 1, length, rotary_dim / 2]`, float32.
        layout: `"half"` or `"interleaved"`.
        factor: on both.

    Returns:
        Cosines, and sines that are negative in a plane's first dimension, `[batch or 1, 1, length, rotary_dim]` each, float32.
    """
    cosine, sine = angles.cos(), angles.sin()
    if factor != 1.0:
        cosine, sine = cosine * factor, sine * factor
    if layout == "half":
        return torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
    return cosine.repeat_interleave(2, dim=-1), torch.stack((-sine, sine), dim=-1).flatten(-2)


def turn(x: Tensor, rotation: tuple[Tensor, Tensor], layout: str) -> Tensor:
    """Return `x` turned in planes of two dimensions: `x * cosine + partner * signed sine`.

    Args:
        x: `[batch, heads, length, head_dim]`; dimensions beyond those of `rotation` stay as they are.
        rotation: see `rotation_by`.
        layout: `"half"` or `"interleaved"`: which dimensions share a plane.

    Returns:
        The shape and dtype of `x`; computed in at least float32.
    """
    cosine, signed_sine = rotation
    rotary_dim = cosine.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((turn(x[..., :rotary_dim], rotation, layout), x[..., rotary_dim:]), dim=-1)
    if x.dtype != cosine.dtype:  # asked first, as a cast that has nothing to do costs a small call as much as one that has
        if x.dtype.itemsize < 4:
            return turn(x.float(), rotation, layout).to(x.dtype)
        cosine, signed_sine = cosine.to(x.dtype), signed_sine.to(x.dtype)
    if x.numel() >= LARGE and not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad):
        return _turn_in_one_buffer(x, cosine, signed_sine, layout)
    partner = x.roll(rotary_dim // 2, dims=-1) if layout == "half" else x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x * cosine, partner, signed_sine)


def _turn_in_one_buffer(x: Tensor, cosine: Tensor, signed_sine: Tensor, layout: str) -> Tensor:
    """Return what `turn` does, with one allocation instead of three; its backward pass, and its small calls, would be slower."""
    half = x.shape[-1] // 2
    first, second = (slice(half), slice(half, None)) if layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    out = x * cosine
    out[..., first].addcmul_(x[..., second], signed_sine[..., first])
    out[..., second].addcmul_(x[..., first], signed_sine[..., second])
    return out


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


@SCHEMES.register("rope")
class Rope(Scheme):
    """`query_i . key_j` with both turned by their positions: it depends on `i - j`.

    Start on a pretrained model: none preserves the function, as projections trained without rotation meet one. The scalings are for
    a model already trained with `rope`: swap to the same base and layout with a `rope_type`; there are no parameters.
    """

    Options = RopeOptions
    summary = "queries and keys turned by their position"
    shift_invariant = True

    options: RopeOptions

    def __init__(self, options: RopeOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Work out the frequencies, as numbers: there is nothing that a reload or a move to another device could lose.

        Raises:
            OptionError: dimensions that do not make whole planes, or lists that do not have one number a plane.
        """
        super().__init__(options, geometry, layers)
        exact = geometry.head_dim * options.fraction
        rotary_dim = round(exact)  # 0.58 of 100 is 57.99999999999999 in floating point
        if abs(exact - rotary_dim) > 1e-6 or rotary_dim < 2 or rotary_dim % 2:
            raise OptionError(
                f"rope: head_dim {geometry.head_dim} x fraction {options.fraction} gives {exact:g} rotary dimensions; they must be "
                "an even integer of at least 2, as dimensions turn in pairs. Choose another fraction (1.0 needs an even head_dim)."
            )
        self.turning_planes = rotary_dim // 2
        self.rotary_dim = geometry.head_dim if options.rope_type == "proportional" else rotary_dim
        self._check_planes()
        if options.rope_type in LENGTH_DEPENDENT:
            self.shift_invariant = self.caches_rotated_keys = self.cached_equals_uncached = False
        with torch.device("cpu"):  # also where a model is built without memory
            inv_freq, self.attention_factor = self._frequencies()
            self._inv_freq: list[float] = inv_freq.float().tolist()
            if options.rope_type == "longrope":
                self._long_inv_freq: list[float] = self._from_transformers(self.original_length + 1)[0].tolist()

    def _check_planes(self) -> None:
        """Refuse options that do not fit the number of planes."""
        options = self.options
        if options.rope_type in ("dynamic", "ntk") and self.rotary_dim < 4:
            raise OptionError(
                f"rope: rope_type '{options.rope_type}' with {self.rotary_dim} rotary dimensions; it must have at least 4, as the "
                "fastest plane keeps its frequency. Choose a larger fraction, or rope_type 'linear'."
            )
        for option in ("short_factor", "long_factor"):
            divisors = getattr(options, option)
            if divisors is not None and len(divisors) != self.turning_planes:
                raise OptionError(
                    f"rope: option '{option}' has {len(divisors)} numbers; it must have {self.turning_planes}, one for each plane of "
                    f"two dimensions (head_dim {self.geometry.head_dim} x fraction {options.fraction})."
                )

    @property
    def original_length(self) -> int:
        """The length that a scaling starts from, in positions; see `Scheme.original_length`."""
        return self.options.original_max_position_embeddings or self.geometry.trained_length

    def _frequencies(self) -> tuple[Tensor, float]:
        """Return the frequencies of a row no longer than the original length, and the factor on sine and cosine."""
        base, factor = self.options.base, self.options.factor or 1.0
        if self.options.rope_type == "default":
            return inverse_frequencies(self.rotary_dim, base), 1.0
        if self.options.rope_type == "ntk":
            exponent = self.rotary_dim / (self.rotary_dim - 2)
            return inverse_frequencies(self.rotary_dim, base * factor**exponent), 1.0
        return self._from_transformers(None)

    def _from_transformers(self, length: int | Tensor | None, device: torch.device | None = None) -> tuple[Tensor, float]:
        """Return transformers' frequencies and factor at a length; see `transformers_frequencies`."""
        options = self.options
        parameters = {"rope_type": options.rope_type, "rope_theta": options.base, "factor": 1.0, **options.scaling()}
        if options.rope_type == "proportional":  # the others turn `rotary_dim` dimensions and know of no more
            parameters["partial_rotary_factor"] = (2 * self.turning_planes + 0.5) / self.rotary_dim  # which is then rounded down
        config = RotaryConfig(parameters, self.rotary_dim, self.original_length)
        return transformers_frequencies(config, length, device)

    def inv_freq(self, position_ids: Tensor) -> Tensor:
        """Return the frequencies that turn one call's queries or keys, radians per position, float32.

        Args:
            position_ids: `[batch or 1, length]`; for the keys of a step, those of all keys.

        Returns:
            `[rotary_dim / 2]`, or `[batch or 1, 1, length, rotary_dim / 2]` where they depend on how long a sequence is so far.
        """
        device = position_ids.device
        if self.options.rope_type not in LENGTH_DEPENDENT:
            return torch.tensor(self._inv_freq, dtype=torch.float32, device=device)
        length = sequence_lengths(position_ids)[:, None, :, None]
        if self.options.rope_type == "dynamic":
            return self._from_transformers(length, device)[0]
        short, long = (
            torch.tensor(values, dtype=torch.float32, device=device) for values in (self._inv_freq, self._long_inv_freq)
        )
        return torch.where(length > self.original_length, long, short)

    def angles(self, position_ids: Tensor) -> Tensor:
        """Return `position * theta_k`, radians, `[batch or 1, 1, length, rotary_dim / 2]`, float32.

        `default` and `ntk` have theta in float64, rounded to float32; transformers' functions compute in float32. The
        product with a position is rounded once more.
        """
        return position_ids[:, None, :, None].float() * self.inv_freq(position_ids)

    def prepare_positions(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines; see `rotation_by` and `Scheme.prepare_positions`."""
        return rotation_by(self.angles(position_ids), self.options.layout, self.attention_factor)

    def transform_query_key(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], *, role: Literal["query", "key"], layer: int
    ) -> Tensor:
        """Return `x` turned by its positions; see `Scheme.transform_query_key`."""
        return turn(x, rotation, self.options.layout)
