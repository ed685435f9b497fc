"""Direct calls of the attention functions, with schemes made for it, and a module that stands for an attention module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pe_swap.attention import backends
from pe_swap.attention.call import AttentionCall, CallShared
from pe_swap.attention.shared_in_call import NOTHING_SHARED
from pe_swap.schemes import Geometry, Scheme
from pe_swap.schemes.base import ATTENTION_HOOKS
from pe_swap.schemes.options import SchemeOptions
from pe_swap.schemes.positions import Positions, slots_from
from tests.support.schemes import build as build_scheme
from tests.support.schemes import geometry

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TestOptions(SchemeOptions):
    """Options of the schemes of this file, which no registry has."""

    __test__ = False
    scheme: ClassVar[str] = "test"


class Turning(Scheme):
    """Queries and keys times a number of their position."""

    def transform_query_key(self, x: Tensor, rotation: Tensor, *, role: Literal["query", "key"], layer: int) -> Tensor:
        return x * factor_of(rotation, role)[:, None, :, None].to(x.dtype)


class Relative(Scheme):
    """A bias of the distance, trained: one table for each head."""

    def __init__(self, options: SchemeOptions, sizes: Geometry, layers: tuple[int, ...]) -> None:
        super().__init__(options, sizes, layers)
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(sizes.num_heads, 101, generator=generator, dtype=torch.float64))

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        return self.table[:, distance + 50]


class Scoring(Scheme):
    """A bias of query and key."""

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        return 0.3 * query[..., :1] * key[..., :1].transpose(-1, -2) + 0.1 * scaling * positions.distance.to(query.dtype)


class ScoringAndRelative(Relative):
    """Both."""

    score_bias = Scoring.score_bias


class Valuing(Scheme):
    """A term of the output."""

    def value_bias(self, probabilities: Tensor, positions: Positions, *, layer: int) -> Tensor:
        return (probabilities * positions.distance).sum(-1, keepdim=True)


class Carrying(Scheme):
    """A bias of two numbers beside every key, another pair for each query head."""

    def extra_key_channels(self, hidden_states: Tensor, *, layer: int) -> Tensor:
        heads = torch.arange(1.0, self.geometry.num_heads + 1)
        parts = torch.stack((hidden_states[..., :1] * heads, hidden_states[..., 1:2] + heads), dim=-1)
        return parts.transpose(1, 2)

    def score_bias(self, query: Tensor, key: Tensor, positions: Positions, *, scaling: float, layer: int) -> Tensor:
        assert positions.carried is not None
        return (positions.carried[..., 0] - positions.carried[..., 1])[:, :, None].expand(-1, -1, query.shape[2], -1)


class Window(Scheme):
    """ALiBi that does not look further back than 5 positions."""

    limit = 5

    def relative_bias(self, distance: Tensor, *, layer: int) -> Tensor:
        slopes = torch.arange(1.0, self.geometry.num_heads + 1)[:, None] / 4
        return (slopes * -distance.abs()).masked_fill(distance < -self.limit, -torch.inf)

    def reach(self, layer: int) -> int | None:
        return self.limit


class Wide(Scheme):
    """Queries and keys that come back half as wide again."""

    @property
    def key_width(self) -> int:
        return self.geometry.head_dim * 3 // 2

    def transform_query_key(self, x: Tensor, rotation: Tensor, *, role: Literal["query", "key"], layer: int) -> Tensor:
        more = x[..., : self.key_width - x.shape[-1]] * factor_of(rotation, role)[:, None, :, None].to(x.dtype)
        return torch.cat((x, more), dim=-1)


class Narrow(Wide):
    """As `Wide`, and it says another width than it returns."""

    @property
    def key_width(self) -> int:
        return self.geometry.head_dim + 1

    def transform_query_key(self, x: Tensor, rotation: Tensor, *, role: Literal["query", "key"], layer: int) -> Tensor:
        return x[..., :-1]


def factor_of(position_ids: Tensor, role: str) -> Tensor:
    """Return a number for each position, other ones for queries than for keys."""
    return 1 + 0.1 * position_ids.double() if role == "query" else (0.3 * position_ids.double()).cos()


def build(scheme_class: type[Scheme], num_heads: int = 4, head_dim: int = 6) -> Scheme:
    """Return a scheme of this file, or a registered one with default options; its parameters are moved off their start."""
    sizes = geometry(num_heads=num_heads, head_dim=head_dim, hidden_size=num_heads * head_dim)
    if hasattr(scheme_class, "Options"):
        scheme = build_scheme(scheme_class.Options.scheme, sizes=sizes)
    else:
        scheme = scheme_class(TestOptions(), sizes, (0,))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return scheme


class Attention(nn.Module):
    """What an attention function reads of the module that calls it."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 4
    q_len: int = 7
    kv_len: int = 7
    head_dim: int = 6
    first_key_slot: int = 0


@dataclass(frozen=True)
class DirectCall:
    """One call of an attention function: what it is given, float64."""

    scheme: Scheme
    sizes: Sizes
    query: Tensor
    key: Tensor
    value: Tensor
    hidden_states: Tensor
    mask: Tensor | None
    context: AttentionCall

    def run(self, backend: str, **keywords: Any) -> Tensor:
        """Return the output, `[batch, heads, q_len, head_dim]`."""
        sizes = self.sizes
        mask = self.mask
        if mask is not None and backend == "eager":
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
        output, _ = backends.attention_function(backend)(
            Attention(sizes.heads // sizes.key_heads).eval(),
            self.query,
            self.key,
            self.value,
            mask,
            attention_call=self.context,
            **keywords,
        )
        return output.transpose(1, 2)

    def allowed(self, row: int, i: int, j: int) -> bool:
        """Tell whether query `i` may look at key `j`."""
        return bool(self.mask[row, 0, i, j]) if self.mask is not None else j <= i


def direct_call(
    scheme: Scheme, sizes: Sizes, *, masked: bool = False, query_is_scaled: bool = False, trains: bool = False
) -> DirectCall:
    """Return a call with random inputs; `masked` has a mask with padding at the left of row 1, and is needed beside cached keys."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(trains)

    query = random(sizes.batch, sizes.heads, sizes.q_len, sizes.head_dim)
    key, value = (random(sizes.batch, sizes.key_heads, sizes.kv_len, sizes.head_dim) for _ in range(2))
    hidden_states = random(sizes.batch, sizes.kv_len, sizes.heads * sizes.head_dim)
    first_query = sizes.kv_len - sizes.q_len
    mask = None
    if masked or first_query:
        mask = torch.ones(sizes.batch, 1, sizes.q_len, sizes.kv_len, dtype=torch.bool).tril(first_query)
        mask[1:, :, :, :2] = False
        mask[1:, :, :2, 0] = True  # no query looks nowhere
    slots = slots_from(sizes.first_key_slot + first_query, sizes.q_len, CPU)
    hooks = scheme.hooks & ATTENTION_HOOKS
    rotation = scheme.prepare_positions(slots[None]) if "transform_query_key" in hooks else None
    carried = scheme.extra_key_channels(hidden_states, layer=0).double() if "extra_key_channels" in hooks else None
    call = CallShared(scheme, 0, slots, slots[None], sizes.first_key_slot, first_query, rotation, NOTHING_SHARED, None)
    context = AttentionCall(0, hooks, "cache", call, first_query > 0, None, False, query_is_scaled, carried)
    return DirectCall(scheme, sizes, query, key, value, hidden_states, mask, context)
