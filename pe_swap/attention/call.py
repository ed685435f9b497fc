"""What one call of a self-attention module is given: its scheme, and where its queries stand."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pe_swap.attention.kept_with_cache import Kept
from pe_swap.attention.shared_in_call import SharedInCall
from pe_swap.schemes.base import Scheme
from pe_swap.schemes.positions import Positions, slots_from, unkept


def key_ids(query_slots: Tensor, key_slots: Tensor, query_ids: Tensor) -> Tensor:
    """Return the keys' position ids, `[batch or 1, kv_len]`, int64.

    Without a cache they are the queries'. With one, whose keys' ids nothing kept, they count back by one from a row's first query of
    the highest id: that is a real token, where padding on the left has id 0 and padding on the right repeats the last id. The empty
    tail of a static cache gets that highest id too, so that a scheme which asks how long a row is so far hears the same from keys
    as from queries.
    """
    if query_slots.shape == key_slots.shape:
        return query_ids
    anchor = query_ids.argmax(dim=-1, keepdim=True)
    slots = query_slots.expand(query_ids.shape[0], -1)
    highest = query_ids.gather(-1, anchor)
    return torch.minimum(key_slots[None, :] - (slots.gather(-1, anchor) - highest), highest)


@dataclass(frozen=True)
class CallShared:
    """What the layers that a scheme serves share in one call of the model.

    Attributes:
        scheme: the scheme, its weights on the layers' device.
        query_slots: `[q_len]`, int64, the queries' indices in the key buffer.
        query_ids: `[batch or 1, q_len]`, int64.
        rotation: what the scheme's `rotation` gave for them, or None where it turns nothing.
        memo: what layers share.
        kept: what calls with the same cache share, or None.
    """

    scheme: Scheme
    query_slots: Tensor
    query_ids: Tensor
    rotation: Any
    memo: SharedInCall
    kept: Kept | None


@dataclass(frozen=True)
class AttentionCall:
    """What travels with one attention call, as its keyword argument `attention_call`.

    Attributes:
        layer: index of the layer.
        scheme_index: which of the model's schemes serves the layer.
        hooks: the attention hooks the scheme overrides.
        cache_argument: the name under which the attention module takes its cache.
        call: what it shares with other layers.
        has_cache: the call has a cache, whose keys may be more than the queries.
        keys_are_rotated: the keys were rotated before they were cached.
        carried: what the scheme's `extra_key_channels` gave, `[batch, heads, q_len, channels]`, in a call without a cache. None
            where it carries nothing, and in a call with a cache, whose keys then have these channels after their own.
    """

    layer: int
    scheme_index: int
    hooks: frozenset[str]
    cache_argument: str | None
    call: CallShared
    has_cache: bool
    keys_are_rotated: bool
    carried: Tensor | None = None

    @property
    def scheme(self) -> Scheme:
        """The layer's scheme, looked up once a call."""
        return self.call.scheme

    def positions(self, kv_len: int, device: torch.device, carried: Tensor | None = None) -> Positions:
        """Return where the queries and all `kv_len` keys stand, on the device of the scores, with what the scheme makes of it."""

        def work_out() -> Positions:
            # A model may be spread over devices.
            query_slots, query_ids = self.call.query_slots.to(device), self.call.query_ids.to(device)
            key_slots = slots_from(0, kv_len, device)
            keep = unkept if self.call.kept is None else self.call.kept.keep
            return Positions(query_slots, key_slots, query_ids, key_ids(query_slots, key_slots, query_ids), once=once, keep=keep)

        def once(key: Hashable, work_out: Callable[[], Any]) -> Any:
            return self.call.memo.once((key, kv_len, device), (self.call.query_slots, self.call.query_ids), work_out)

        found: Positions = once("positions", work_out)
        found = found if carried is None else replace(found, carried=carried)
        prepared = self.scheme.prepare(found, layer=self.layer)
        return found if prepared is None else replace(found, prepared=prepared)

    def rotated(self, x: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return the call's own queries or keys, `[batch, heads, q_len, head_dim]`, turned by their positions."""
        return self.call.scheme.transform_query_key(x, self.call.rotation, role=role, layer=self.layer)

    def rotated_cache(self, key: Tensor) -> Tensor:
        """Return all keys, `[batch, heads, kv_len, head_dim]`, turned by their positions, where they were cached without."""
        ids = self.positions(key.shape[2], key.device).key_ids
        rotation = self.call.memo.once(("rotation", self.scheme_index), (ids,), lambda: self.scheme.prepare_positions(ids))
        return self.scheme.transform_query_key(key, rotation, role="key", layer=self.layer)

    def bias_by_distance(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """Return the relative bias for every pair, `[heads, q_len + kv_len - 1]`, float32.

        Entry `n` belongs to the pairs whose key index minus query index in the call is `n - (q_len - 1)`.
        """
        scheme, layer = self.scheme, self.layer

        def work_out() -> Tensor:
            first_slot = self.call.query_slots[0].to(device)
            bias = scheme.relative_bias(torch.arange(1 - q_len, kv_len, device=device) - first_slot, layer=layer)
            return bias.contiguous()  # a transposed table's rows, a head apart, cost the kernel half of its speed

        served = None if scheme.bias_is_shared else layer
        return self.call.memo.once(("bias", self.scheme_index, served, q_len, kv_len, device), (self.call.query_slots,), work_out)

    def split(self, key: Tensor, head_dim: int) -> tuple[Tensor, Tensor | None]:
        """Return the keys, `[batch, heads, kv_len, head_dim]`, and what was carried beside each of them, or None."""
        if "extra_key_channels" not in self.hooks:
            return key, None
        if self.carried is not None:
            return key, self.carried.to(key.device)
        return key[..., :head_dim], key[..., head_dim:]
