"""A model that was swapped by itself, inside of another one: that one must not save it.

Its configuration is the one from before, so the folder would be read without the schemes, and without an error where they have no weights.
Nothing tells a module which others hold it. So the module of the schemes looks, when its state is taken, for who is saving. Models of
transformers are refused; those of others may swap their part when they are built.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pe_swap.errors import SwapStateError

SAVE = inspect.unwrap(PreTrainedModel.save_pretrained).__code__
"""The function of transformers that writes a folder."""


def require_saved_by_whom_it_is_known(base_model: nn.Module) -> None:
    """Refuse the state of a swapped model to a `save_pretrained` whose model says nothing of the swap.

    Args:
        base_model: the model that holds the schemes.

    Raises:
        SwapStateError: it is a part of the model that is saved, and was swapped by itself.
    """
    saved = saving_model()
    if saved is None or not type(saved).__module__.startswith("transformers."):
        return
    said = getattr(getattr(base_model, "config", None), "pe_swap", None)
    if any(getattr(config, "pe_swap", None) == said for config in configurations(saved.config)):
        return
    whole, part = type(saved).__name__, type(base_model).__name__
    raise SwapStateError(
        f"This {whole} holds a {part} that was swapped by itself, and its own configuration does not say so: the folder would be read "
        f"without the schemes. Call restore_positional on the {part}, then swap the {whole}; or save the {part} alone."
    )


def saving_model() -> PreTrainedModel | None:
    """Return the model whose `save_pretrained` is running, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is SAVE:
            saved: PreTrainedModel = frame.f_locals["self"]
            return saved
        frame = frame.f_back
    return None


def configurations(config: Any) -> Iterator[Any]:
    """Yield a configuration and those of its parts."""
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from configurations(part)
