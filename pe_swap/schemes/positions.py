"""What a scheme is told about positions.

Two notions that padding and caches pull apart:

* a *slot* is an index in the key buffer of one attention call, padding and the unused tail of a static cache included;
* a *position id* is what the model was given, or would have counted itself: mask-aware in `generate`, where the first
  real token of a left-padded row has id 0.

Where ids rise by one a slot, differences of slots equal differences of ids, so a relative scheme needs slots only. Padding inside a
row, or ids that jump, are distance to it: a cache keeps no ids. A scheme that depends on where a query stands (absolute vectors,
FIRE, log-length scaling) needs ids.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Once = Callable[[Hashable, Callable[[], Any]], Any]
"""From a key and a function to what the function gives, or gave for that key at the same positions in another layer."""


Keep = Callable[[Hashable, tuple[Any, ...], Callable[[], Any]], Any]
"""From a key, what a result is of, and a function, to what the function gives, or gave in an earlier call with the same cache."""


def unkept(key: Hashable, of: tuple[Any, ...], work_out: Callable[[], Any]) -> Any:
    """Return what `work_out` gives: nothing is kept."""
    return work_out()


def unshared(key: Hashable, work_out: Callable[[], Any]) -> Any:
    """Return what `work_out` gives: nothing is shared."""
    return work_out()


@dataclass(frozen=True)
class Positions:
    """Where the queries of one block and the keys they meet stand.

    Attributes:
        query_slots: `[q_len]`, int64, the queries' indices in the key buffer.
        key_slots: `[kv_len]`, int64.
        query_ids: `[batch or 1, q_len]`, int64.
        key_ids: `[batch or 1, kv_len]`, int64, as far as they are known: a cache keeps no ids, and its keys' are counted back from the
            queries'.
        carried: what the scheme's `extra_key_channels` gave for every key, `[batch, heads, kv_len, channels]`, or None where it carries
            nothing.
        prepared: what the scheme's `prepare` gave for the whole call, or None where nobody asked it yet.
        queries_after: queries of the call after this block's last.
        once: what a scheme works out of these positions and its options alone goes through this, and is shared by the layers of a
            call. It is kept until the call ends: use it for what is small, as in decoding.
        keep: what a scheme works out of its weights alone, or of plain numbers, goes through this, and is kept as long as the cache for
            later calls, until the weights change. It takes a key, the weights and numbers, and the function. Weights are compared number
            by number: use it for what costs much more than to read them.
    """

    query_slots: Tensor
    key_slots: Tensor
    query_ids: Tensor
    key_ids: Tensor
    carried: Tensor | None = None
    prepared: Any = None
    queries_after: int = 0
    once: Once = unshared
    keep: Keep = unkept

    def by_distance(self, of_call: Tensor) -> Tensor:
        """Return a block's part of what the whole call has for each distance.

        Args:
            of_call: `[..., n]`, entry `n` for the pairs of the call whose key index minus query index is `n - (q_len - 1)`.

        Returns:
            `[..., q_block + kv_block - 1]`, a view; entry `n` is for the same difference within the block.
        """
        return of_call[..., self.queries_after :][..., : len(self.query_slots) + len(self.key_slots) - 1]

    @property
    def distance(self) -> Tensor:
        """Key slot minus query slot, `[q_len, kv_len]`, int64: negative looks back."""
        return self.key_slots[None, :] - self.query_slots[:, None]

    def block(self, start: int, stop: int, key_stop: int | None = None) -> Positions:
        """Return the positions of queries `start` to `stop` against the keys before `key_stop`."""
        ids = self.query_ids[:, start:stop] if self.query_ids.shape[1] > 1 else self.query_ids
        carried = None if self.carried is None else self.carried[:, :, :key_stop]

        def once(key: Hashable, work_out: Callable[[], Any]) -> Any:
            return self.once((start, stop, key_stop, key), work_out)

        return Positions(
            self.query_slots[start:stop],
            self.key_slots[:key_stop],
            ids,
            self.key_ids[:, :key_stop],
            carried,
            self.prepared,
            self.queries_after + len(self.query_slots) - min(stop, len(self.query_slots)),
            once,
            self.keep,
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
