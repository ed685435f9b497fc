"""Learned absolute positions: the model's own table, made longer.

Gehring et al., "Convolutional Sequence to Sequence Learning" (2017, arXiv:1705.03122), section 3.1, and Devlin et al., "BERT"
(2019, arXiv:1810.04805), add one trained vector per position. Ways to more rows:

* `interpolate`: linear resampling with both ends kept, as Chen et al., "Extending Context Window of Large Language Models via
  Positional Interpolation" (2023, arXiv:2306.15595), do with rotations;
* `tile` and `group`: Zhu et al., "LongEmbed" (2024, arXiv:2404.12096), section 3.2, "recurrent" and "grouped positions";
* `mean`: old rows kept, every new row their mean.

Differs from the papers: rows may also become fewer, by the same formulas.

On a grid (images) the table has one vector per place of the trained grid, and every call resamples it for the grid of its image, as
vision models do (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929, section 3.2): cubic convolution along
both axes.

`python -m pe_swap show learned` draws it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions, none_is
from pe_swap.schemes.parameters import require_numbers
from pe_swap.schemes.position_range import require_within

ON_A_GRID = {"bicubic": False, "bicubic_antialiased": True}
"""Ways to resample a table of a grid, and whether with a filter against aliasing, where the grid becomes coarser."""


def resample_grid(table: Tensor, trained: tuple[int, ...], sides: tuple[int, ...], extend: str) -> Tensor:
    """Return a table of a grid for another grid, `[rows * columns, width]`; the same vectors for the same grid.

    Args:
        table: `[trained rows * trained columns, width]`, row by row.
        trained: rows and columns of its grid.
        sides: rows and columns of the other.
        extend: one of `ON_A_GRID`.

    Returns:
        The vectors row by row, in the dtype of `table`, computed in float32. New row r lies at `(r + 1/2) * trained rows / rows - 1/2`.
    """
    if tuple(sides) == tuple(trained):
        return table
    image = table.float().reshape(1, *trained, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(sides), mode="bicubic", align_corners=False, antialias=ON_A_GRID[extend])
    return image.permute(0, 2, 3, 1).reshape(-1, table.shape[-1]).to(table.dtype)


def resample(table: Tensor, max_length: int, extend: str) -> Tensor:
    """Return a table of `max_length` rows made from `table`, `[rows, input_size]`; the same rows for `max_length == rows`.

    With L old and M new rows, new row m is, by `extend`:

    * `interpolate`: the linear interpolation at `m (L - 1) / (M - 1)`, so that both ends stay;
    * `tile`: row `m mod L`;
    * `group`: row `floor(m L / M)`;
    * `mean`: row m below L, the mean of all rows from there on.
    """
    rows = table.shape[0]
    if max_length == rows:
        return table.clone()
    new = torch.arange(max_length, device=table.device)
    if extend == "tile":
        return table[new % rows]
    if extend == "group":
        return table[new * rows // max_length]
    if extend == "mean":
        return torch.where((new < rows)[:, None], table[new.clamp(max=rows - 1)], table.mean(0))
    # In integers: a place rounded to float32 would miss the last row.
    steps = max(max_length - 1, 1)
    below, remainder = new * (rows - 1) // steps, new * (rows - 1) % steps
    weight = (remainder / steps).to(table.dtype)
    return torch.lerp(table[below], table[(below + 1).clamp(max=rows - 1)], weight[:, None])


@dataclass(frozen=True)
class LearnedOptions(SchemeOptions):
    """Options of `learned`.

    Attributes:
        max_length: rows of the new table, in positions; None keeps the trained number. Not on a grid, where there is no limit.
        extend: how rows come about, `"interpolate"`, `"tile"`, `"group"` or `"mean"`. On a grid, `"interpolate"` is as the model itself
            does, or `"bicubic"`; `"bicubic"` and `"bicubic_antialiased"` name a way.
    """

    scheme: ClassVar[str] = "learned"

    max_length: int | None = field(default=None, metadata=none_is("the trained length"))
    extend: str = "interpolate"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_int("max_length", 1, LARGEST_LENGTH)
        self.require_choice("extend", ("interpolate", "tile", "group", "mean", *ON_A_GRID))

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedLearnedOptions:
        """Write out the trained length where none was given, and on a grid the way to resample.

        Raises:
            OptionError: an option for rows in a model whose positions are a grid, or the other way.
        """
        if not geometry.sides:
            if self.extend in ON_A_GRID:
                raise self.refuse("extend", "'interpolate', 'tile', 'group' or 'mean' where tokens stand in one row")
            return self.written_out(ResolvedLearnedOptions, native, max_length=geometry.trained_length)
        places = math.prod(geometry.sides)
        if self.max_length not in (None, places):
            raise OptionError(
                f"learned: option 'max_length' is {self.max_length}, but this model's positions are a grid, whose table is resampled for "
                "every image, so that it has no limit. Leave it out."
            )
        if self.extend not in ("interpolate", *ON_A_GRID):
            raise self.refuse("extend", "'interpolate', 'bicubic' or 'bicubic_antialiased' on a grid")
        extend = native.options.get("extend", "bicubic") if self.extend == "interpolate" else self.extend
        return dataclasses.replace(self, extend=extend).written_out(ResolvedLearnedOptions, native, max_length=places)


@dataclass(frozen=True, kw_only=True)
class ResolvedLearnedOptions(LearnedOptions):
    """`LearnedOptions` as they are used and saved."""

    max_length: int


@SCHEMES.register("learned")
class Learned(Scheme):
    """`x_i = token_i + table[i]`; on a grid, the table resampled for the image's.

    Start on a pretrained model: at the trained length the very same table, which changes nothing; `tile` and `mean` keep the first
    rows exactly, `interpolate` and `group` move every position and need some fine-tuning. In a model without a table: zeros, which is the
    model without its positions.
    """

    Options = LearnedOptions
    starts_from_table = True
    summary = "one trained vector per position: the model's own table, made longer"
    on_a_grid = "itself"

    options: ResolvedLearnedOptions

    def __init__(self, options: ResolvedLearnedOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the table, `[max_length, input_size]`; on a grid, one row per place of the trained one."""
        super().__init__(options, geometry, layers)
        self.table = nn.Parameter(torch.empty(options.max_length, geometry.input_size))
        self.reset_parameters()

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the rows of the table, in its dtype; see `Scheme.encode`.

        Raises:
            PositionRangeError: a position the table has no row for. Not checked inside a compiled graph.
        """
        require_within(position_ids, self.options.max_length, self.name)
        return self.table[position_ids]

    def encode_grid(self, sides: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the table, resampled where the grid is another than the trained one, in its dtype; see `Scheme.encode_grid`."""
        return resample_grid(self.table, self.geometry.sides, sides, self.options.extend)[None]

    @property
    def max_length(self) -> int | None:
        """Rows of the table; None on a grid, where it is resampled."""
        return None if self.geometry.sides else self.options.max_length

    def reset_parameters(self) -> None:
        """Set the table to zeros."""
        nn.init.zeros_(self.table)

    def start_from(self, native: Native) -> None:
        """Make the table from the model's own, where it has one."""
        if native.table is None:
            return
        if not self.table.is_meta:
            require_numbers(native.table)
        with torch.no_grad():
            if self.geometry.sides:
                self.table.copy_(native.table)
            else:
                self.table.copy_(resample(native.table, self.options.max_length, self.options.extend))
        rows = native.table.shape[0]
        keeps_rows = self.options.extend in ("tile", "mean") and self.options.max_length >= rows
        self.keeps_function = keeps_rows or self.options.max_length == rows
