"""Loss of every target, with the vocabulary projection done in chunks.

Logits of a whole long context are never held: at 16,384 tokens and GPT-2's 50,257-word vocabulary they alone would take 3.3 GB.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe_swap.errors import UnsupportedModelError

LOGITS_IN_A_CHUNK = 2**24
"""Numbers: 64 MB of float32 logits at a time."""


class _Output(tuple[Tensor]):
    """A base model's output that holds the last hidden states and nothing else."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        """Return None for every other part of an output (cache, attentions, router logits)."""
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenStates:
    """Stands in for a base model: whatever it is called with, it returns the given hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self._output = _Output((hidden,))
        self._output.last_hidden_state = hidden

    def __getattr__(self, name: str) -> _GivenStates:
        """Return itself for a part of the base model (OPT's head calls `model.decoder`)."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        """Return the given states."""
        return self._output


class VocabularyHead:
    """All that a language model does after its last hidden states, whatever modules that takes.

    The model's own `forward` runs, with given hidden states in place of its base model's. So dense layers before the projection
    (BERT, RoBERTa, DistilBERT), and scales and caps after it (Cohere, Gemma 2), are the model's own, under any module names.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits, `[tokens, vocab_size]`, from last hidden states, `[tokens, hidden_size]`; leading dimensions are kept."""
        model, name = self._model, self._model.base_model_prefix
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device)
        base_model = model._modules[name]
        model._modules[name] = _GivenStates(flat)  # a callable is all that forward needs
        try:
            logits: Tensor = type(model).forward(model, input_ids=ids).logits
        finally:
            model._modules[name] = base_model
        return logits.reshape(*hidden.shape[:-1], -1)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters behind the hidden states, a tied projection's included, each once."""
        inside = {id(parameter) for parameter in self._model.base_model.parameters()}
        found = [parameter for parameter in self._model.parameters() if id(parameter) not in inside]
        found += self._model.get_output_embeddings().parameters()
        yield from {id(parameter): parameter for parameter in found}.values()


def vocabulary_head(model: PreTrainedModel) -> VocabularyHead:
    """Return what leads from last hidden states to logits.

    Raises:
        UnsupportedModelError: the model has no head for words.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no vocabulary head, so it has no perplexity. Load the checkpoint as a causal or masked "
            "language model."
        )
    return VocabularyHead(model)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Tensor:
    """Return the last hidden states, `[batch, length, hidden_size]`, computed without a cache."""
    if "use_cache" in inspect.signature(type(model.base_model).forward).parameters:
        arguments["use_cache"] = False
    found: Tensor = model.base_model(input_ids, attention_mask=None, **arguments).last_hidden_state
    return found


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check, on a few tokens, that hidden states through the head are the model's own logits.

    A model that hands more to its head than hidden states would get a wrong loss without a sign of it. Of logits that are not finite
    nothing can be told; the losses of such a model are not finite either.

    Raises:
        UnsupportedModelError: they are not.
    """
    head = vocabulary_head(model)
    input_ids = torch.arange(min(4, model.config.vocab_size), device=model.device)[None]
    expected = model(input_ids).logits
    found = head(hidden_states(model, input_ids))
    if not torch.isfinite(found).all():
        return
    if found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"The logits of {type(model).__name__} depend on more than its last hidden states, so its loss cannot be computed in "
            "chunks. Evaluate a model whose head takes hidden states alone."
        )


@torch.no_grad()
def target_losses(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, scored: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Return `-log p(target)` in nats where `scored`, flattened, float64.

    Args:
        model: a language model in evaluation mode.
        input_ids: `[batch, length]`.
        targets: `[batch, length]`, the token each output is to predict.
        scored: `[batch, length]`, boolean.
        position_ids: `[batch, length]`, where the tokens stand; 0, 1, 2, ... where None.

    Returns:
        `[number of scored targets]`, in the order of `scored`'s entries.
    """
    losses = [
        F.cross_entropy(logits, wanted, reduction="none").double()
        for logits, wanted in scored_logits(model, input_ids, targets, scored, position_ids)
    ]
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def target_hits(model: PreTrainedModel, input_ids: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """Return whether the most probable token is the target where `scored`, flattened, boolean; arguments as in `target_losses`."""
    hits = [logits.argmax(-1) == wanted for logits, wanted in scored_logits(model, input_ids, targets, scored)]
    return torch.cat(hits) if hits else torch.zeros(0, dtype=torch.bool)


def scored_logits(
    model: PreTrainedModel, input_ids: Tensor, targets: Tensor, scored: Tensor, position_ids: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits, `[tokens, vocab_size]`, float32, and targets, `[tokens]`, of the scored tokens, a chunk at a time."""
    head = vocabulary_head(model)
    arguments = {} if position_ids is None else {"position_ids": position_ids}
    hidden = hidden_states(model, input_ids, **arguments)[scored]
    wanted = targets[scored]
    rows = max(1, LOGITS_IN_A_CHUNK // model.config.vocab_size)
    for start in range(0, len(wanted), rows):
        yield head(hidden[start : start + rows]).float(), wanted[start : start + rows]
