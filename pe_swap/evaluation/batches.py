"""Batches as large as memory allows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import PreTrainedModel

Result = TypeVar("Result")

CPU_OUT_OF_MEMORY = "can't allocate memory"
"""What torch's CPU allocator says, in an error that has no class of its own."""


def in_batches(count: int, size: int, compute: Callable[[slice], Result]) -> list[Result]:
    """Return the results of a computation on `count` rows, `size` at a time; half as many from where memory runs out.

    Args:
        count: rows.
        size: rows at a time, at least one.
        compute: gets which rows.

    Raises:
        RuntimeError: torch's own, where a single row does not fit.
    """
    found: list[Result] = []
    start, size = 0, max(1, size)
    while start < count:
        stop = min(start + size, count)
        try:
            found.append(compute(slice(start, stop)))
        except RuntimeError as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
            size = (stop - start) // 2
        else:
            start = stop
            continue
        clear_device_cache(garbage_collection=True)  # outside the handler, whose error holds what the failed batch had allocated
        print(f"Out of memory: {size} windows at a time from here. A smaller --batch_tokens starts so.", file=sys.stderr)
    return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error of torch's says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)


def on_device(model: PreTrainedModel, compute: Callable[..., Tensor], *parts: Tensor) -> Callable[[slice], Tensor]:
    """Return what `in_batches` calls: `compute(model, some rows of each part)`, there on the model's device, the result on the CPU."""
    return lambda rows: compute(model, *(part[rows].to(model.device) for part in parts)).cpu()
