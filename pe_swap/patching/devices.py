"""Positional weights where a layer needs them, when tools have spread a model over devices or processes.

transformers, accelerate and FSDP place a module's weights for the module's own call. Positional weights stand in the table's place and
are read by every layer, which no such tool can know: offloaded weights would be read as the empty tensors they left behind, and
sharded ones as one process's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from pe_swap.patching.holder import SchemeHolder
from pe_swap.schemes.base import Scheme

Module = TypeVar("Module", bound=nn.Module)


def bring_back_offloaded(holder: SchemeHolder) -> None:
    """Load every positional weight that accelerate keeps on disk or on another device, for good: they are few, and in use all the time."""
    for module in holder.schemes.modules():
        hook = vars(module).get("_hf_hook")  # what accelerate leaves on whatever has tensors of its own and was placed
        if hook is not None and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            hook.pre_forward(module)
            remove_hook_from_module(module)


@contextmanager
def offloaded_at_hand(*modules: nn.Module | None) -> Iterator[None]:
    """Load the weights of modules that accelerate keeps on disk or on another device, for as long as the context lasts.

    A swap reads the model's own table, bias and token embeddings outside of a call.
    """
    loaded = []
    for module in (inside for given in modules if given is not None for inside in given.modules()):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            hook.pre_forward(module)
            loaded.append((module, hook))
    try:
        yield
    finally:
        for module, hook in loaded:
            hook.post_forward(module, None)


def gather_own_shards(holder: SchemeHolder) -> None:
    """Gather positional weights that FSDP2 shards as a unit of their own, until the backward pass has their gradients.

    FSDP2 gathers a unit's weights for its call and lets them go at its end, before any layer reads them. Sharded with the root (no
    `fully_shard` of the holder itself) they are there for the whole call anyway.
    """
    kind: Any = type(holder)  # asked of the class, as an attribute that a module has not takes long to miss
    if hasattr(kind, "unshard") and hasattr(kind, "set_reshard_after_forward"):  # one that `fully_shard` was called on
        kind.set_reshard_after_forward(holder, False)
        kind.unshard(holder)


def on_device(scheme: Scheme, device: torch.device) -> Scheme:
    """Return the scheme with its weights on `device`: itself where they are, else a stand-in whose gradients reach its weights."""
    weight = next(scheme.parameters(), None)
    return scheme if weight is None or weight.device == device else _stand_in(scheme, device)


def _stand_in(module: Module, device: torch.device) -> Module:
    """Return a shallow copy of a module whose weights are copies on `device`, part of the graph."""
    copy: Module = nn.Module._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]  # torch's own
    for name, parameter in module._parameters.items():
        setattr(copy, name, None if parameter is None else parameter.to(device))
    for name, buffer in module._buffers.items():
        copy._buffers[name] = None if buffer is None else buffer.to(device)
    for name, child in module._modules.items():
        copy._modules[name] = None if child is None else _stand_in(child, device)
    return copy
