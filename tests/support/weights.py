"""Random weights that make positions matter, and the copying of a block's weights into GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import pe_swap

LAYERS, TRAINED_LENGTH, LENGTH, VOCABULARY = 2, 16, 48, 61


def randomize(model: nn.Module) -> Any:
    """Fill every parameter with numbers large enough that attention is far from uniform."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def gpt2(heads: int, hidden_size: int, scheme: str, options: Mapping[str, Any], **config: Any) -> GPT2LMHeadModel:
    """Return a swapped GPT-2 whose weights are still to be set."""
    sizes = {"n_embd": hidden_size, "n_head": heads, "n_layer": LAYERS, "n_positions": TRAINED_LENGTH, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **config)).eval()
    return pe_swap.swap_positional(model, scheme, keep_mean=False, **options)


def copy_linear(target: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Set a GPT-2 projection from a linear layer's `[out, in]` weight; GPT-2 holds it transposed."""
    with torch.no_grad():
        target.weight.copy_(weight.T)
        target.bias.zero_() if bias is None else target.bias.copy_(bias)


def copy_norm(target: nn.LayerNorm, source: nn.Module) -> None:
    """Set a layer norm; some peers have no bias."""
    with torch.no_grad():
        target.weight.copy_(source.weight)
        target.bias.zero_() if getattr(source, "bias", None) is None else target.bias.copy_(source.bias)


def from_heads(fused: Tensor, heads: int) -> Tensor:
    """Return a fused projection's rows from `[heads, 3, head_dim]` in GPT-2's order, `[3, heads, head_dim]`."""
    return fused.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def token_ids() -> Tensor:
    """Return two rows of random tokens, longer than the swapped model's table was."""
    return torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def left_padded(ids: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Return ids whose second row starts with padding, and their mask."""
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids * mask, mask
