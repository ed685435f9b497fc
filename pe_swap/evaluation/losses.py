"""Loss of every target, with the vocabulary projection done in chunks.

Logits of a whole long context are never held: at 16,384 tokens and GPT-2's 50,257-word vocabulary they alone would take 3.3 GB.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.errors import UnsupportedModelError

LOGITS_IN_A_CHUNK = 2**24
"""Numbers: 64 MB of float32 logits at a time."""


def vocabulary_head(model: PreTrainedModel) -> Any:
    """Return the module from last hidden states to logits.

    Raises:
        UnsupportedModelError: the model has no head for words.
    """
    for name in ("lm_head", "cls"):
        head = getattr(model, name, None)
        if head is not None:
            return head
    raise UnsupportedModelError(
        f"{type(model).__name__} has no vocabulary head (lm_head or cls), so it has no perplexity. Load the checkpoint as a causal or "
        "masked language model."
    )


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check, on a few tokens, that hidden states through the head are the model's own logits.

    Families that scale, cap or project logits outside the head would get a wrong loss without a sign of it. Of logits that are not
    finite nothing can be told; the losses of such a model are not finite either.

    Raises:
        UnsupportedModelError: they are not.
    """
    head = vocabulary_head(model)
    input_ids = torch.arange(min(4, model.config.vocab_size), device=model.device)[None]
    expected = model(input_ids).logits
    found = head(model.base_model(input_ids).last_hidden_state)
    if not torch.isfinite(found).all():
        return
    if found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"{type(model).__name__} does more to its logits than its vocabulary head does, so its loss cannot be computed in chunks. "
            "Evaluate a model whose logits are its head's output, such as GPT-2 or BERT."
        )


@torch.no_grad()
def target_losses(model: PreTrainedModel, input_ids: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Return `-log p(target)` in nats where `scored`, flattened, float64.

    Args:
        model: a language model in evaluation mode.
        input_ids: `[batch, length]`.
        targets: `[batch, length]`, the token each output is to predict.
        scored: `[batch, length]`, boolean.

    Returns:
        `[number of scored targets]`, in the order of `scored`'s entries.
    """
    head = vocabulary_head(model)
    arguments: dict[str, Any] = {"attention_mask": None}
    if getattr(model.config, "is_decoder", True):
        arguments["use_cache"] = False
    hidden = model.base_model(input_ids, **arguments).last_hidden_state[scored]
    wanted = targets[scored]
    rows = max(1, LOGITS_IN_A_CHUNK // model.config.vocab_size)
    losses = [
        F.cross_entropy(head(hidden[start : start + rows]).float(), wanted[start : start + rows], reduction="none").double()
        for start in range(0, len(wanted), rows)
    ]
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64)
