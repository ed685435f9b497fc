"""A language model's training loss without its logits: the vocabulary projection in chunks, forward and backward.

GPT-2's logits for 8 x 1,024 tokens take 1.6 GB, their gradient as much again. Here a chunk of hidden states goes through the head,
its gradients are taken at once, and only they are kept (Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2, on any device).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from pe_swap.errors import UnsupportedModelError
from pe_swap.evaluation.losses import LOGITS_IN_A_CHUNK, check_head, vocabulary_head
from pe_swap.families import known_loss_type
from pe_swap.runs.data import IGNORED

LossOfChunk = Callable[[Tensor, slice], Tensor]
"""From logits, `[rows, vocabulary]`, and the rows they are of, to the sum of their losses."""

States = Callable[[], Tensor]
"""Runs the model, and returns its last hidden states, `[batch, length, hidden_size]`."""

Objective = Callable[[States, Tensor, Tensor, Mapping[str, Any]], Tensor]
"""From what runs the model, token ids, targets and the call's other arguments to a loss, summed over the targets but the ignored."""


class _ChunkedLoss(torch.autograd.Function):
    """Sum of a loss over rows, with every gradient computed while the logits are there."""

    @staticmethod
    def forward(ctx: Any, head: Any, rows: int, loss_of: LossOfChunk, hidden: Tensor, *weights: Tensor) -> Tensor:
        """Return the summed loss, nats, float32.

        Args:
            ctx: autograd's.
            head: the module from hidden states to logits.
            rows: hidden states in a chunk.
            loss_of: the loss of a chunk.
            hidden: `[tokens, hidden_size]`.
            weights: the head's parameters that train.
        """
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        gradients = [torch.zeros_like(weight) for weight in weights]
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                part = hidden[chunk].detach().requires_grad_()
                loss = loss_of(head(part).float(), chunk)
            found = torch.autograd.grad(loss, (part, *weights))
            hidden_gradient[chunk] = found[0]
            for gradient, added in zip(gradients, found[1:], strict=True):
                gradient += added
            total += loss.detach()
        ctx.save_for_backward(hidden_gradient, *gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients found before."""
        hidden_gradient, *gradients = ctx.saved_tensors
        (factor,) = grad_outputs
        return None, None, None, hidden_gradient * factor, *(gradient * factor for gradient in gradients)


def summed_in_chunks(model: PreTrainedModel, hidden: Tensor, loss_of: LossOfChunk) -> Tensor:
    """Return the sum of a loss on a model's logits, float32, without holding the logits of all rows.

    Args:
        model: the language model whose head is used.
        hidden: `[rows, hidden_size]`, last hidden states.
        loss_of: the loss of some rows' logits.
    """
    head = vocabulary_head(model)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    total: Tensor = _ChunkedLoss.apply(head, rows_of_a_chunk(model), loss_of, hidden, *weights)  # type: ignore[no-untyped-call]  # torch's own
    return total


def summed_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of `-log p(target)`, nats, float32, over all targets but the ignored.

    Args:
        model: the language model whose head is used.
        hidden: `[batch, length, hidden_size]`, last hidden states.
        targets: `[batch, length]`, the token each state is to predict, or -100.
    """
    wanted = targets != IGNORED
    rows, labels = hidden[wanted], targets[wanted]
    projection = plain_projection(model, rows)
    if projection is None:
        return summed_in_chunks(model, rows, lambda logits, chunk: F.cross_entropy(logits, labels[chunk], reduction="sum"))
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows_of_a_chunk(model))
    total: Tensor = F.linear_cross_entropy(
        rows, projection.weight, labels, linear_bias=projection.bias, reduction="sum", options=options
    )
    return total


@torch.no_grad()
def plain_projection(model: PreTrainedModel, hidden: Tensor) -> nn.Linear | None:
    """Return a model's vocabulary head where PyTorch's own loss in chunks takes it (from 2.13 on; it is faster than ours), else None.

    That is one linear layer in float32, outside autocast, with nothing before or after it: no norm, no cap, no adapter, no hook (a tool's
    that brings its weight, or anybody's that changes its output), since the layer itself is not called.

    Args:
        model: the language model.
        hidden: `[rows, hidden_size]`, last hidden states.
    """
    linear = model.get_output_embeddings()
    is_plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and linear.weight.dtype == torch.float32
    if not is_plain or not hasattr(F, "linear_cross_entropy") or torch.is_autocast_enabled(hidden.device.type) or not len(hidden):
        return None
    if linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear):
        return None
    probe = 100.0 * hidden[:1].detach()  # large, so that a cap on logits shows
    logits = F.linear(probe, linear.weight, linear.bias)
    return linear if torch.allclose(vocabulary_head(model)(probe), logits, rtol=1e-5, atol=1e-5) else None


def rows_of_a_chunk(model: PreTrainedModel) -> int:
    """Return how many rows of logits are held at a time."""
    return max(1, LOGITS_IN_A_CHUNK // int(model.config.vocab_size))


def summed_divergence(model: PreTrainedModel, hidden: Tensor, teacher: PreTrainedModel, teacher_hidden: Tensor) -> Tensor:
    """Return the sum of `sum_v p(v) (log p(v) - log q(v))`, nats, float32, with `p` a teacher's distribution and `q` a model's.

    Args:
        model: the language model that learns.
        hidden: `[rows, hidden_size]`, its last hidden states.
        teacher: the one that it learns from.
        teacher_hidden: `[rows, hidden_size]`, the teacher's.
    """
    teacher_head = vocabulary_head(teacher)

    def loss_of(logits: Tensor, chunk: slice) -> Tensor:
        with torch.no_grad():
            wanted = teacher_head(teacher_hidden[chunk]).float().log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)

    return summed_in_chunks(model, hidden, loss_of)


@contextmanager
def loss_in_chunks(model: PreTrainedModel, objective: Objective | None = None) -> Iterator[None]:
    """Let a model's training calls (with `labels`) return a loss and no logits, for as long as the context lasts.

    Calls without labels, or without gradients, go the model's own way. Divides by `num_items_in_batch` where it is given, also in
    masked models: transformers' own BERT takes it and does not, which makes the loss wrong under gradient accumulation.

    Args:
        model: the language model; or one without a head for words, for an objective that needs none.
        objective: the summed loss; cross-entropy by default.

    Raises:
        UnsupportedModelError: the model's loss is neither the causal nor the masked one, or not that of its head's output.
    """
    has_head = model.base_model is not model
    loss_type = known_loss_type(model) if has_head else "ForMaskedLM"
    if loss_type not in ("ForCausalLM", "ForMaskedLM"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has the loss '{loss_type}'; a loss in chunks is the causal or the masked one. Load the checkpoint "
            "as a causal or masked language model."
        )
    if has_head:
        was_training = model.training
        check_head(model.eval())
        model.train(was_training)
    own_forward = model.forward

    @functools.wraps(own_forward)
    def forward(input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or not torch.is_grad_enabled():
            return own_forward(input_ids=input_ids, labels=labels, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        targets = kwargs.pop("shift_labels", None)
        if targets is None:
            targets = labels if loss_type == "ForMaskedLM" else F.pad(labels[:, 1:], (0, 1), value=IGNORED)

        def states() -> Tensor:
            hidden: Tensor = model.base_model(input_ids, **kwargs).last_hidden_state
            return hidden

        loss = summed_loss(model, states(), targets) if objective is None else objective(states, input_ids, targets, kwargs)
        return MaskedLMOutput(loss=loss / ((targets != IGNORED).sum() if items is None else items))

    model.forward = forward
    try:
        yield
    finally:
        vars(model).pop("forward", None)  # also what accelerate has put around ours
