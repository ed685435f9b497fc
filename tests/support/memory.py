"""How large the tensors of a computation get."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Record the largest tensor that any operation returns, by the numbers its storage holds; one on the meta device holds none.

    Attributes:
        numbers: numbers in the largest storage.
        rows: rows of the largest tensor whose last dimension is `width`.
    """

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.width = width
        self.numbers = 0
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
                if self.width and tensor.dim() and tensor.shape[-1] == self.width:
                    self.rows = max(self.rows, tensor.numel() // self.width)
        return out
