"""T5's relative bias: one trained number per head and bucket of distances.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (JMLR 2020, arXiv:1910.10683),
section 2.1; buckets as in the authors' code: one per distance for small ones, logarithmic ones up to `max_distance`, one for the rest.
Encoders split the buckets between keys before and keys after the query.

On a grid there is a table per axis and their biases are added, or, with `table="joint"`, one table for pairs of distances (BEiT's; see
`joint.py`).

Differs from the paper: T5 does not divide scores by `sqrt(head_dim)`; most models do, and the bias is added after that.

`python -m pe_swap show t5` draws it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pe_swap.errors import OptionError
from pe_swap.schemes.base import SCHEMES, Scheme
from pe_swap.schemes.geometry import Geometry, Native
from pe_swap.schemes.options import LARGEST_LENGTH, LARGEST_TABLE, SchemeOptions, native_or, none_is


def bucket_of(distance: Tensor, num_buckets: int, max_distance: int, is_causal: bool) -> Tensor:
    """Return the bucket of each distance (key minus query), int64, the shape of `distance`.

    With B buckets for a side, `n` the distance in positions and `E = B / 2`: bucket n below E, else
    `min(B - 1, E + floor(log(n / E) / log(max_distance / E) * (B - E)))`. Keys after the query take the buckets from B on in an
    encoder, and count as distance 0 in a decoder. The logarithm is taken in float32, as T5's code does: bucket edges are exact.
    """
    offset = torch.zeros_like(distance)
    if not is_causal:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        n = distance.abs()
    else:
        n = -distance.clamp(max=0)
    exact = num_buckets // 2
    share = torch.log(n.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (share * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(n < exact, n, logarithmic)


def bucket_starts(num_buckets: int, max_distance: int) -> Tensor:
    """Return where each bucket of a side begins, `[num_buckets]`, float32, positions: n, then `E * (max_distance / E) ** share`."""
    exact = num_buckets // 2
    share = (torch.arange(num_buckets) - exact).clamp(min=0) / (num_buckets - exact)
    return torch.where(share > 0, exact * (max_distance / exact) ** share, torch.arange(num_buckets))


@dataclass(frozen=True)
class T5Options(SchemeOptions):
    """Options of `t5`. Left out, the buckets are those of a model that has such a bias.

    Attributes:
        num_buckets: buckets in all; an encoder gives half of them to each side.
        max_distance: from this distance on, in positions, all share the last bucket.
        start: `"recency"`, `-log(1 + n)` in every head with n where a bucket begins, so that a key n away weighs 1 / (1 + n);
            `"zero"`, no bias; `"model"`, the model's own bias; or None for `"model"` in a model with a bias in the same buckets, else
            `"recency"` in decoders and `"zero"` in encoders.
        table: on a grid, `"per_axis"`, buckets of rows and buckets of columns, whose biases are added; `"joint"`, an entry for every pair
            of a row and a column distance in each layer, without buckets; None is `"joint"` in a model that has such a bias (BEiT).
    """

    scheme: ClassVar[str] = "t5"

    num_buckets: int | None = field(default=None, metadata=native_or(32))
    max_distance: int | None = field(default=None, metadata=native_or(128))
    start: str | None = field(
        default=None, metadata=none_is("the model's own, else 'recency' in decoders and 'zero' in encoders")
    )
    table: str | None = field(default=None, metadata=none_is("on a grid, the model's own or 'per_axis'"))

    def __post_init__(self) -> None:
        """Check the values, and what they are together where both are given."""
        super().__post_init__()
        self.require_int("num_buckets", 4, LARGEST_TABLE)
        self.require_int("max_distance", 2, LARGEST_LENGTH)
        self.require_choice("start", ("recency", "zero", "model"))
        self.require_choice("table", ("per_axis", "joint"))
        if self.table == "joint":
            self._require_no_buckets()
        if self.num_buckets is None:
            return
        if self.num_buckets % 2:
            raise self.refuse("num_buckets", "even: half of the buckets hold one distance each, half are logarithmic")
        if self.max_distance is not None and self.max_distance <= self.num_buckets // 2:
            raise self.refuse(
                "max_distance", f"above num_buckets / 2 = {self.num_buckets // 2}, the distances with a bucket each"
            )

    def _require_no_buckets(self) -> None:
        """Refuse what a joint table does not read."""
        if self.start == "recency":
            raise self.refuse("start", "'zero' or 'model' beside table='joint'")
        for option in ("num_buckets", "max_distance"):
            if getattr(self, option) is not None and not isinstance(self, ResolvedT5Options):
                raise self.refuse(option, "None beside table='joint', which has an entry for every pair of distances")

    def resolve(self, geometry: Geometry, native: Native) -> ResolvedT5Options:
        """Return the options with the buckets, the start and the table of a grid written out.

        Raises:
            OptionError: a table of a grid where tokens stand in one row.
        """
        asked = [getattr(self, option) for option in ("num_buckets", "max_distance")]
        own = [native.options.get(option) for option in ("num_buckets", "max_distance")]
        table = self.table
        if geometry.sides and table is None:
            table = "joint" if native.options.get("table") == "joint" and asked == [None, None] else "per_axis"
        elif table is not None and not geometry.sides:
            raise OptionError(
                f"t5: option 'table' is {table!r}, and this model's tokens stand in one row. Leave it out; it is for images."
            )
        has_own = native.bias_table is not None and table == native.options.get("table")
        has_own = has_own and all(wanted in (None, value) for wanted, value in zip(asked, own, strict=True))
        start = "model" if has_own else "recency" if geometry.is_causal else "zero"
        return self.written_out(ResolvedT5Options, native, start=start, table=table)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, without those that say nothing: of a table in a text, of buckets in a joint one."""
        unread = {None: ("table",), "joint": ("num_buckets", "max_distance")}.get(self.table, ())
        return {name: value for name, value in super().to_dict().items() if name not in unread}


@dataclass(frozen=True, kw_only=True)
class ResolvedT5Options(T5Options):
    """`T5Options` as they are used and saved."""

    num_buckets: int
    max_distance: int
    start: str


@SCHEMES.register("t5")
class T5(Scheme):
    """`bias[h](distance) = table[bucket(distance), h]`, in logits, one table for all layers.

    Start on a pretrained model: a decoder prefers near keys from the first (`start="recency"`). That replaces the recency that the
    removed table had provided, and buckets that a short training never reaches continue the same curve: from zero they would stay there.
    A sentence encoder (MiniLM) is disturbed less by no bias at all. `configs/README.md` has the figures. In a model with such a bias:
    that bias.
    """

    Options = T5Options
    summary = "a trained bias per head for each bucket of distances"
    on_a_grid = "summed"
    shift_invariant = True
    bias_is_shared = True

    options: ResolvedT5Options

    def __init__(self, options: ResolvedT5Options, geometry: Geometry, layers: tuple[int, ...]) -> None:
        """Build the table, `[num_buckets, heads]`.

        Raises:
            OptionError: an encoder's buckets that do not split into two sides of two halves.
        """
        super().__init__(options, geometry, layers)
        if not geometry.is_causal and options.num_buckets % 4:
            raise options.refuse("num_buckets", "a multiple of 4 in an encoder, where each side has half of the buckets")
        self.table = nn.Parameter(torch.empty(options.num_buckets, geometry.num_heads))
        self.reset_parameters()

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        """Return the table's entries, `[heads, n]`; see `Scheme.relative_bias`."""
        buckets = bucket_of(distance, self.options.num_buckets, self.options.max_distance, self.geometry.is_causal)
        return self.table.float()[buckets].T

    def reset_parameters(self) -> None:
        """Set the table to the start."""
        if self.options.start != "recency":
            nn.init.zeros_(self.table)
            return
        sides = 1 if self.geometry.is_causal else 2
        starts = bucket_starts(self.options.num_buckets // sides, self.options.max_distance)
        with torch.no_grad():
            self.table.copy_(-starts.log1p().repeat(sides)[:, None])

    def start_from(self, native: Native) -> None:
        """Take the model's own bias, where the start is that.

        Raises:
            OptionError: the model has no bias of these sizes.
        """
        if self.options.start != "model":
            return
        if native.bias_table is None or native.bias_table.shape != self.table.shape:
            raise self.options.refuse(
                "start", f"'recency' or 'zero', as this model has no bias of {self.options.num_buckets} buckets"
            )
        with torch.no_grad():
            self.table.copy_(native.bias_table)
        own = [native.options.get(option) for option in ("num_buckets", "max_distance")]
        self.keeps_function = own == [self.options.num_buckets, self.options.max_distance]
