"""Learned absolute positions: the model's own table, made longer.

Gehring et al., "Convolutional Sequence to Sequence Learning" (2017, arXiv:1705.03122), section 3.1, and Devlin et al., "BERT"
(2019, arXiv:1810.04805), add one trained vector a position. Ways to more rows:

* `interpolate`: linear resampling with both ends kept, as Chen et al., "Extending Context Window of Large Language Models via
  Positional Interpolation" (2023, arXiv:2306.15595), do with rotations;
* `tile` and `group`: Zhu et al., "LongEmbed" (2024, arXiv:2404.12096), section 3.2, "recurrent" and "grouped positions";
* `mean`: old rows kept, every new row their mean.

Differs from the papers: rows may also become fewer, by the same formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from pe_swap.errors import PositionRangeError
from pe_swap.schemes.base import SCHEMES, Geometry, Scheme
from pe_swap.schemes.options import LARGEST_LENGTH, SchemeOptions


@dataclass(frozen=True)
class LearnedOptions(SchemeOptions):
    """Options of `learned`.

    Attributes:
        max_length: rows of the new table, in positions; None keeps the trained number.
        extend: how rows come about, `"interpolate"`, `"tile"`, `"group"` or `"mean"`.
    """

    scheme: ClassVar[str] = "learned"

    max_length: int | None = None
    extend: str = "interpolate"

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_int("max_length", 1, LARGEST_LENGTH, none_is="the trained length")
        self.require_choice("extend", ("interpolate", "tile", "group", "mean"))

    def resolve(self, geometry: Geometry, position_table: Tensor | None) -> LearnedOptions:
        """Write out the trained length where none was given."""
        return self if self.max_length is not None else replace(self, max_length=geometry.trained_length)


def resample(table: Tensor, max_length: int, extend: str) -> Tensor:
    """Return a table of `max_length` rows made from `table`, `[rows, hidden_size]`; the same rows for `max_length == rows`.

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


@SCHEMES.register("learned")
class Learned(Scheme):
    """`x_i = token_i + table[i]`.

    Start on a pretrained model: at the trained length the very same table, which changes nothing; `tile` and `mean` keep the first
    rows exactly, `interpolate` and `group` move every position and need some fine-tuning.
    """

    Options = LearnedOptions
    needs_table = True
    summary = "one trained vector a position: the model's own table, made longer"

    options: LearnedOptions

    def __init__(self, options: LearnedOptions, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the table."""
        super().__init__(options, geometry, layers)
        self.table = nn.Parameter(torch.empty(self.max_length, geometry.hidden_size))
        self.reset_parameters()

    @property
    def max_length(self) -> int:
        """Rows of the table."""
        return self.options.max_length or self.geometry.trained_length

    def reset_parameters(self) -> None:
        """Set the table as transformers starts one: normal, standard deviation 0.02."""
        nn.init.normal_(self.table, std=0.02)

    def start_from(self, position_table: Tensor) -> None:
        """Make the table from the model's own."""
        with torch.no_grad():
            self.table.copy_(resample(position_table, self.max_length, self.options.extend))

    def encode(self, position_ids: Tensor) -> Tensor:
        """Return the rows of the table, in its dtype; see `Scheme.encode`.

        Raises:
            PositionRangeError: a position the table has no row for. Not checked inside a compiled graph.
        """
        if not torch.compiler.is_compiling():
            refuse_outside(position_ids, self.max_length, self.name)
        return self.table[position_ids]


def refuse_outside(position_ids: Tensor, max_length: int, scheme: str) -> None:
    """Refuse positions below 0 and from `max_length` on.

    Raises:
        PositionRangeError: there is one.
    """
    if not position_ids.numel():
        return
    lowest, highest = (int(end) for end in position_ids.aminmax())
    if lowest < 0:
        raise PositionRangeError(
            f"Position {lowest} is below 0, and the scheme '{scheme}' has vectors for 0 to {max_length - 1}. Give position_ids that "
            "count from 0; padding may have any of them."
        )
    if highest >= max_length:
        raise PositionRangeError(
            f"Position {highest} is beyond the {max_length} that the scheme '{scheme}' has vectors for. Shorten the "
            f'input, or swap to a longer table: swap_positional(model, "learned", max_length=...).'
        )
