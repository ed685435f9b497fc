"""The positions that a scheme is given.

Two notions that padding and caches pull apart:

* a *slot* counts the tokens that went into the key-value cache, padding included: the first token of a row has slot 0. The keys of one
  attention call stand in consecutive slots. The first of them is 0 unless the cache drops old keys (a sliding window). The unused tail
  of a static cache has the slots that its keys will have;
* a *position id* is what the model was given, or would have counted itself: mask-aware in `generate`, where the first
  real token of a left-padded row has id 0.

Where ids rise by one per slot, differences of slots equal differences of ids, so a relative scheme needs slots only. Padding inside a
row, or ids that jump, count as distance to it: a cache keeps no ids. A scheme that depends on where a query stands (absolute vectors,
FIRE, log-length scaling) needs ids.

In an image a position is a row and a column, so ids have one more dimension, of two. Tokens that stand nowhere (class and register
tokens) have -1 on every axis. Slots count them too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ShareAcrossLayers = Callable[[Hashable, Callable[[], Any]], Any]
"""`share(key, compute)`: returns `compute()`, or the value that another layer computed under `key` at the same positions."""

Keep = Callable[[Hashable, tuple[Any, ...], Callable[[], Any]], Any]
"""`keep(key, inputs, compute)`: returns `compute()`, or the value of an earlier call with the same cache, `key` and equal `inputs`."""


def unkept(key: Hashable, inputs: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
    """Return `compute()`: nothing is kept."""
    return compute()


def unshared(key: Hashable, compute: Callable[[], Any]) -> Any:
    """Return `compute()`: nothing is shared."""
    return compute()


@dataclass(frozen=True)
class Positions:
    """Positions of the queries of one block and of the keys they are scored against.

    Attributes:
        query_slots: `[q_len]`, int64. In the key buffer of the call, a query has the index `query_slots - key_slots[0]`.
        key_slots: `[kv_len]`, int64, rising by one; the first is not 0 where a cache has dropped keys.
        query_ids: `[batch or 1, q_len]`, int64; on a grid `[batch or 1, q_len, axes]`, with -1 for a token that stands nowhere.
        key_ids: `[batch or 1, kv_len]`, int64, as far as they are known: a cache keeps no ids, and its keys' are counted back from the
            queries'.
        carried: what the scheme's `extra_key_channels` gave for every key, `[batch, heads, kv_len, channels]`, or None where it carries
            nothing.
        prepared: what the scheme's `prepare` gave for the whole call, or None where it was not called yet.
        queries_after: number of queries of the call after this block's last.
        keys_before: number of keys of the call before this block's first.
        share_across_layers: `share_across_layers(key, compute)` returns `compute()`, which another layer of the same call may have
            computed already. For what depends on these positions and on the scheme's options alone. Results are held until the call
            ends: use it for what is small, as in decoding.
        keep: `keep(key, inputs, compute)` returns `compute()`, which an earlier call with the same cache may have computed already.
            For what depends on `inputs` alone: weights, and plain numbers. Weights are compared element by element: use it for what
            costs much more than reading them.
        sides: rows and columns of the grid that tokens stand on; empty where they stand in a row.
    """

    query_slots: Tensor
    key_slots: Tensor
    query_ids: Tensor
    key_ids: Tensor
    carried: Tensor | None = None
    prepared: Any = None
    queries_after: int = 0
    keys_before: int = 0
    share_across_layers: ShareAcrossLayers = unshared
    keep: Keep = unkept
    sides: tuple[int, ...] = ()

    def by_distance(self, of_call: Tensor) -> Tensor:
        """Return a block's part of what the whole call has for each distance.

        Args:
            of_call: `[..., n]`, entry `n` for the pairs of the call whose key index minus query index is `n - (q_len - 1)`.

        Returns:
            `[..., q_block + kv_block - 1]`, a view; entry `n` is for the same difference within the block.
        """
        first = self.queries_after + self.keys_before
        return of_call[..., first:][..., : len(self.query_slots) + len(self.key_slots) - 1]

    @property
    def distance(self) -> Tensor:
        """Key slot minus query slot, `[q_len, kv_len]`, int64: negative looks back."""
        return self.key_slots[None, :] - self.query_slots[:, None]

    def along(self, axis: int, row: int) -> Positions:
        """Return the positions of one row of a batch along one axis of a grid, as slots and as ids; what stands nowhere gets 0."""
        query_ids, key_ids = (ids[row, :, axis].clamp(min=0) for ids in (self.query_ids, self.key_ids))
        return Positions(query_ids, key_ids, query_ids[None], key_ids[None])

    def block(self, start: int, stop: int, key_stop: int | None = None, key_start: int = 0) -> Positions:
        """Return the positions of queries `start` to `stop` and of keys `key_start` to `key_stop`."""
        ids = self.query_ids[:, start:stop] if self.query_ids.shape[1] > 1 else self.query_ids
        carried = None if self.carried is None else self.carried[:, :, key_start:key_stop]

        def share(key: Hashable, compute: Callable[[], Any]) -> Any:
            return self.share_across_layers((start, stop, key_start, key_stop, key), compute)

        return Positions(
            self.query_slots[start:stop],
            self.key_slots[key_start:key_stop],
            ids,
            self.key_ids[:, key_start:key_stop],
            carried,
            self.prepared,
            self.queries_after + len(self.query_slots) - min(stop, len(self.query_slots)),
            self.keys_before + key_start,
            share,
            self.keep,
            self.sides,
        )


def pairs_of(by_distance: Tensor, kv_len: int) -> Tensor:
    """Return for every pair what a query has for its distance, `[..., q_len, kv_len]`, a view where `by_distance` is contiguous.

    Args:
        by_distance: `[..., q_len, q_len + kv_len - 1]`; entry `n` of query `i` is for the key `j` with `j - i = n - (q_len - 1)`.
        kv_len: number of keys.
    """
    q_len, distances = by_distance.shape[-2:]
    if q_len == 1:
        return by_distance
    rows = by_distance.flatten(-2)[..., q_len - 1 : q_len - 1 + q_len * (distances - 1)]  # one entry fewer a row shifts it by one
    return rows.reshape(*rows.shape[:-1], q_len, distances - 1)[..., :kv_len]


def slots_from(first_slot: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Return `first_slot + [0, ..., length - 1]`, `[length]`, int64; a tensor `first_slot` keeps a compiled graph whole."""
    return torch.arange(length, device=device) + first_slot
