"""What stands for the method by which the embeddings of an image model work out the vectors of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pe_swap.patching.holder import HolderRef


@dataclass(frozen=True)
class GridVectors:
    """Called in place of `interpolate_pos_encoding` of the embeddings; a plain object, as `LayerBinding`.

    Attributes:
        holder_ref: where the stack's schemes are.
    """

    holder_ref: HolderRef

    def __call__(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Return the vectors of all tokens of an image, `[1, tokens, input_size]`; height and width are in pixels."""
        vectors: Tensor = self.holder_ref.holder(embeddings, height, width)
        return vectors
