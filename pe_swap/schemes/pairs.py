"""From products with the rows of a table to scores of pairs."""

from __future__ import annotations

from torch import Tensor


def picked(by_row: Tensor, rows: Tensor) -> Tensor:
    """Return for each pair the product with the row of its distance, `by_row[..., i, rows[i, j]]`.

    A query is multiplied by every row once, and pairs pick from that: no tensor has a dimension for queries, keys and `head_dim` together.

    Args:
        by_row: `[batch, heads, q_len, rows]`.
        rows: `[q_len, kv_len]`, int64.

    Returns:
        `[batch, heads, q_len, kv_len]`.
    """
    return by_row.gather(-1, rows.expand(*by_row.shape[:2], *rows.shape))
