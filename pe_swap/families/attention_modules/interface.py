"""What these modules share: the cache's argument, and the call of an attention function."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""What transformers calls the cache in a call of a model or of an attention module: from 5.24 on, before, and in older families."""


def attention_class(path: str) -> type[nn.Module]:
    """Return the class at `module:name`. Imports the family's modeling file."""
    module, name = path.split(":")
    found: type[nn.Module] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return found


def cached(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a call after the update of its cache, which is taken out of `kwargs`."""
    caches = [kwargs.pop(name, None) for name in CACHE_ARGUMENTS]
    for cache in caches:
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
    return key, value


def attend(
    module: nn.Module,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    attention_call: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output of an attention function, `[batch, q_len, heads * head_dim]`, and its probabilities where it has them."""
    given = {} if attention_call is None else {"attention_call": attention_call}
    output, probabilities = ALL_ATTENTION_FUNCTIONS[implementation](
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **given
    )
    return output.flatten(2), probabilities
