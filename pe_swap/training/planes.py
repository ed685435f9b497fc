"""Which planes of a rotary model matter on a text: those whose turn to keep when the others go."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.errors import OptionError, UnsupportedModelError
from pe_swap.families import family_for
from pe_swap.families.native import Rotary
from pe_swap.patching.install import holders_of
from pe_swap.schemes.rope import Rope
from pe_swap.swap import swap_positional


def plane_norms(x: Tensor, rotary_dim: int, layout: str) -> Tensor:
    """Return the mean norm of each plane, `[heads, rotary_dim / 2]`, float32: `mean_t |x_t[plane]|`.

    Args:
        x: `[batch, heads, length, head_dim]`.
        rotary_dim: dimensions that turn.
        layout: `"half"` or `"interleaved"`: which dimensions share a plane.
    """
    turning = x[..., :rotary_dim].float()
    half = rotary_dim // 2
    pairs = (turning[..., :half], turning[..., half:]) if layout == "half" else (turning[..., ::2], turning[..., 1::2])
    return torch.hypot(*pairs).mean((0, 2))


@torch.no_grad()
def strongest_planes(model: PreTrainedModel, input_ids: Tensor, share: float) -> tuple[int, ...]:
    """Return the planes whose queries and keys are longest on a text, for `rope`'s option `planes`.

    A plane counts `mean over layers and heads of (mean_i |query_i[plane]|) (mean_j |key_j[plane]|)`: how much it can add to scores (Ji
    et al., "MHA2MLA", ACL 2025, arXiv:2502.14837, section 3.1, "2-norm"). Differs from the paper: one choice for all layers and heads.

    Args:
        model: a rotary model that is not swapped; it is not changed.
        input_ids: tokens of the text, `[batch, length]`.
        share: of the planes, above 0 and at most 1.

    Raises:
        OptionError: a share that is none.
        UnsupportedModelError: the model does not turn queries and keys, is swapped, or turns in several ways.
    """
    if not 0 < share <= 1:
        raise OptionError(
            f"share is {share!r}; it must be a number above 0 and at most 1. Give the share of planes that shall turn."
        )
    stacks = family_for(model).stacks_in(model.base_model, model.config)
    if getattr(model.config, "pe_swap", None) is not None or not all(isinstance(stack.native, Rotary) for stack in stacks):
        raise UnsupportedModelError(
            f"This {type(model).__name__} is swapped, or has no rotation of its own, so it has no planes to choose from. Use a rotary "
            "model as it was loaded."
        )
    probe = swap_positional(copy.deepcopy(model), "rope", planes="high", planes_share=1.0).eval()
    schemes = [scheme for holder in holders_of(probe) for scheme in holder if isinstance(scheme, Rope)]
    if len(schemes) != 1:
        raise UnsupportedModelError(
            f"The layers of this {type(model).__name__} turn in {len(schemes)} ways, and one choice of planes is for one. Choose planes by "
            "hand, per layer."
        )
    scheme = schemes[0]
    norms: dict[tuple[int, str], Tensor] = {}
    turn = scheme.transform_query_key

    def recorded(x: Tensor, prepared: Any, *, role: Any, layer: int) -> Tensor:
        norms[layer, role] = plane_norms(x, scheme.rotary_dim, scheme.options.layout)
        return turn(x, prepared, role=role, layer=layer)

    scheme.transform_query_key = recorded  # type: ignore[method-assign]  # of a copy that ends here
    probe.base_model(input_ids.to(probe.device), use_cache=False)
    layers = sorted({layer for layer, _ in norms})
    of_layers = []
    for layer in layers:
        query, key = norms[layer, "query"], norms[layer, "key"]
        of_layers.append((query * key.repeat_interleave(len(query) // len(key), dim=0)).mean(0))
    weight = torch.stack(of_layers).mean(0)
    kept = weight.topk(max(1, round(len(weight) * share))).indices
    return tuple(sorted(kept.tolist()))
