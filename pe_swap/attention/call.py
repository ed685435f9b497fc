"""What one call of a self-attention module is given: its scheme, and the positions of its queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pe_swap.attention.kept_with_cache import Inputs, Kept, weights_of
from pe_swap.attention.shared_in_call import SharedInCall
from pe_swap.errors import SchemeContractError, UnsupportedModelError
from pe_swap.schemes.base import Scheme
from pe_swap.schemes.positions import Positions, slots_from

RESERVED_DISTANCES = 256
"""In decoding, biases are computed for the next multiple of so many distances, once for as many tokens."""


def key_ids(query_slots: Tensor, key_slots: Tensor, query_ids: Tensor) -> Tensor:
    """Return the position ids of a cache's keys, `[batch or 1, kv_len]`, int64.

    Nothing kept the ids of keys, so they count back by one from a row's first query of the highest id: that is a real token, where
    padding on the left has id 0 and padding on the right repeats the last id. The empty tail of a static cache gets that highest id
    too, so that queries and keys agree on the length of the row.
    """
    anchor = query_ids.argmax(dim=-1, keepdim=True)
    slots = query_slots.expand(query_ids.shape[0], -1)
    highest = query_ids.gather(-1, anchor)
    return torch.minimum(key_slots[None, :] - (slots.gather(-1, anchor) - highest), highest)


@dataclass(frozen=True)
class CallShared:
    """What the layers that a scheme serves share in one call of the model, as far as their caches dropped the same keys.

    Attributes:
        scheme: the scheme, its weights on the layers' device.
        scheme_index: which of the model's schemes it is.
        query_slots: `[q_len]`, int64.
        query_ids: `[batch or 1, q_len]`, int64; on a grid `[batch or 1, q_len, axes]`.
        first_key_slot: slot of the first key; above 0 where the cache has dropped keys.
        first_query: index of the first query in the key buffer, or None where only a static cache has it.
        rotation: what the scheme's `prepare_positions` gave for the queries, or None where it transforms nothing.
        shared: what all layers share.
        kept: what calls with the same cache share, or None.
        sides: rows and columns of the grid that tokens stand on; empty where they stand in a row.
        bias_of_one_query: `[1, heads, 1, kv_len]`, float32: the bias of a single query over all keys of a cache, where all layers have
            the same and it is all that the scheme does; otherwise None. See `pe_swap.attention.one_query`.
    """

    scheme: Scheme
    scheme_index: int
    query_slots: Tensor
    query_ids: Tensor
    first_key_slot: int
    first_query: int | None
    rotation: Any
    shared: SharedInCall
    kept: Kept | None
    sides: tuple[int, ...] = ()
    bias_of_one_query: Tensor | None = None

    def keep(self, key: Hashable, inputs: Inputs, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, or what an earlier call with the same cache computed for this very scheme; see `Kept.keep`.

        Another swap, or another model, may go on with a cache.
        """
        if self.kept is None:
            return compute()
        return self.kept.keep(key, (self.scheme.options, self.scheme.geometry, *inputs), compute)

    def bias_by_distance(self, q_len: int, kv_len: int, device: torch.device, *, layer: int) -> Tensor:
        """Return the relative bias for every pair, `[heads, q_len + kv_len - 1]`, float32.

        Entry `n` belongs to the pairs whose key index minus query index in the call is `n - (q_len - 1)`.
        """
        scheme = self.scheme
        served = None if scheme.bias_is_shared else layer

        def bias_from(first: int | Tensor, number: int) -> Tensor:
            """Return the bias of so many distances from `first` on."""
            bias = scheme.windowed_bias(slots_from(first, number, device), layer=layer)
            return bias.contiguous()  # in a transposed table the distances of a head lie apart, which halves the kernel's speed

        def compute() -> Tensor:
            number = q_len + kv_len - 1
            if self.first_query is None:
                return bias_from(self.first_key_slot - self.query_slots[0].to(device) + (1 - q_len), number)
            if q_len > 1 or self.first_query != kv_len - 1 or self.kept is None:
                return bias_from(1 - q_len - self.first_query, number)
            # A token decoded with a cache: the next one needs the same distances, and one more.
            reserved = -(-number // RESERVED_DISTANCES) * RESERVED_DISTANCES
            inputs = (reserved, *weights_of(scheme))
            key = ("bias", self.scheme_index, served, device)
            kept: Tensor = self.keep(key, inputs, lambda: bias_from(1 - reserved, reserved))
            return kept[:, reserved - number :]

        key = ("bias", self.scheme_index, served, self.first_key_slot, q_len, kv_len, device)
        return self.shared.get(key, (self.query_slots,), compute)


@dataclass(frozen=True)
class AttentionCall:
    """What travels with one attention call, as its keyword argument `attention_call`.

    Attributes:
        layer: index of the layer.
        hooks: the attention hooks the scheme overrides.
        cache_argument: the name under which the attention module takes its cache, or None where it takes none.
        call: what it shares with other layers.
        has_cache: the call has a cache, whose keys may be more than the queries.
        num_keys: how many keys the cache said that it will return, or None without a cache.
        keys_are_transformed: the keys went through `transform_query_key` before they were cached.
        query_is_scaled: the module multiplies its queries by `head_dim ** -0.5` itself, and hands on a scaling of 1.
        carried: what the scheme's `extra_key_channels` gave, `[batch, heads, q_len, channels]`, or None where it carries nothing. With a
            cache, the keys of the call have these channels after their own.
        native_bias_is_zero: the model hands the module a bias of its own (`position_bias`), which a hook has set to zero for all layers.
    """

    layer: int
    hooks: frozenset[str]
    cache_argument: str | None
    call: CallShared
    has_cache: bool
    num_keys: int | None
    keys_are_transformed: bool
    query_is_scaled: bool = False
    carried: Tensor | None = None
    native_bias_is_zero: bool = False

    @property
    def scheme(self) -> Scheme:
        """The layer's scheme, looked up once per call."""
        return self.call.scheme

    def positions(self, kv_len: int, device: torch.device, carried: Tensor | None = None) -> Positions:
        """Return the positions of the queries and of all `kv_len` keys, on the device of the scores, and what `prepare` gives for them."""
        call = self.call

        def compute() -> Positions:
            # A model may be spread over devices.
            query_slots, query_ids = call.query_slots.to(device), call.query_ids.to(device)
            key_slots = slots_from(call.first_key_slot, kv_len, device)
            ids = query_ids if self.keys_are_the_queries(kv_len) else key_ids(query_slots, key_slots, query_ids)
            return Positions(query_slots, key_slots, query_ids, ids, share_across_layers=share, keep=call.keep, sides=call.sides)

        def share(key: Hashable, compute: Callable[[], Any]) -> Any:
            whole_key = (key, self.has_cache, call.first_key_slot, kv_len, device)
            return call.shared.get(whole_key, (call.query_slots, call.query_ids), compute)

        positions: Positions = share("positions", compute)
        positions = positions if carried is None else replace(positions, carried=carried)
        prepared = self.scheme.prepare(positions, layer=self.layer)
        return positions if prepared is None else replace(positions, prepared=prepared)

    def keys_are_the_queries(self, kv_len: int) -> bool:
        """Tell whether the keys are those of this call's tokens alone, in order.

        Where only a static cache has the first slot, there is no room for anything else where keys are as many as queries.
        """
        return kv_len == len(self.call.query_slots) and self.call.first_query in (0, None)

    def transformed(self, x: Tensor, role: Literal["query", "key"]) -> Tensor:
        """Return the call's own queries or keys, `[batch, heads, q_len, head_dim]`, through the scheme's `transform_query_key`."""
        return self._transform(x, self.call.rotation, role)

    def transformed_cache(self, key: Tensor) -> Tensor:
        """Return all keys, `[batch, heads, kv_len, head_dim]`, through `transform_query_key`, where they were cached without."""
        call = self.call
        ids = self.positions(key.shape[2], key.device).key_ids
        rotation = call.shared.get(("rotation", call.scheme_index), (ids,), lambda: call.scheme.prepare_positions(ids))
        return self._transform(key, rotation, "key")

    def _transform(self, x: Tensor, rotation: Any, role: Literal["query", "key"]) -> Tensor:
        """Call the scheme, and check the shape of what it returns.

        Raises:
            SchemeContractError: the scheme returned another shape than it may.
        """
        found = self.scheme.transform_query_key(x, rotation, role=role, layer=self.layer)
        if found.shape != x.shape and found.shape != (*x.shape[:-1], self.scheme.key_width):
            raise SchemeContractError(
                f"The scheme '{self.scheme.name}' returned a {role} of shape {list(found.shape)} for one of {list(x.shape)}; the last "
                f"dimension must be {x.shape[-1]} or its key_width, {self.scheme.key_width}, and the others as they were. Correct its "
                "transform_query_key or its key_width."
            )
        return found

    def bias_by_distance(self, q_len: int, kv_len: int, device: torch.device) -> Tensor:
        """Return the relative bias for every pair; see `CallShared.bias_by_distance`."""
        return self.call.bias_by_distance(q_len, kv_len, device, layer=self.layer)

    def split(self, key: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Return the keys, `[batch, key_heads, kv_len, width]`, and what was carried beside them, `[batch, heads, kv_len, channels]`.

        For a scheme that carries something.

        Args:
            key: keys as the cache returned them.
            num_heads: number of query heads.

        Raises:
            UnsupportedModelError: something is carried for another number of heads: the module's are split over processes.
        """
        assert self.carried is not None
        if self.carried.shape[1] != num_heads:
            raise UnsupportedModelError(
                f"Layer {self.layer} has {num_heads} heads in this process, and the scheme '{self.scheme.name}' carries numbers for "
                f"{self.carried.shape[1]}: the heads are split over processes (tensor parallelism). Use the model without that, or "
                "another scheme."
            )
        if not self.has_cache:
            return key, self.carried.to(key.device)
        groups, channels = num_heads // key.shape[1], self.carried.shape[-1]
        width = key.shape[-1] - groups * channels
        return key[..., :width], per_query_head(key[..., width:], groups)


def per_key_head(carried: Tensor, key_heads: int) -> Tensor:
    """Return the channels of all query heads of a group side by side, `[batch, key_heads, length, groups * channels]`.

    Args:
        carried: `[batch, heads, length, channels]`; the query heads of a group follow one another.
        key_heads: number of key heads.
    """
    if carried.shape[1] == key_heads:
        return carried
    batch, heads, length, channels = carried.shape
    return carried.reshape(batch, key_heads, heads // key_heads, length, channels).transpose(2, 3).flatten(3)


def per_query_head(channels: Tensor, groups: int) -> Tensor:
    """Undo `per_key_head`: return `[batch, heads, length, channels]`."""
    if groups == 1:
        return channels
    batch, key_heads, length, width = channels.shape
    return channels.reshape(batch, key_heads, length, groups, width // groups).transpose(2, 3).flatten(1, 2)
