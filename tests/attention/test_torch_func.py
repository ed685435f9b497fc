"""Transforms of torch.func: per-sample gradients and ensembles work in every form of attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import DynamicCache

from tests.support.models import CASES, swapped, token_ids, with_cache

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # PyTorch's own: an operator without a batching rule
    pytest.mark.filterwarnings("ignore:.*not been implemented"),
]
CASES_TO_TRANSFORM = [
    "rope",
    "alibi",
    "alibi-trained",
    "t5",
    "kerple",
    "deberta",
    "transformer-xl",
    "shaw-all",
    "fox",
    "cope",
    "xpos",
]


@pytest.mark.parametrize("case", CASES_TO_TRANSFORM)
def test_per_sample_gradients(case: str) -> None:
    assert case in CASES
    model, ids = swapped("gpt2", case), token_ids(3, 7)
    model.config.pad_token_id = None  # or transformers looks for padding among the tokens, which vmap does not take
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, weights, (row[None],), {"use_cache": False}).logits
        return logits.square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
    for index, row in enumerate(ids):
        model.zero_grad()
        model(row[None], use_cache=False).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][index], wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("case", ["deberta", "transformer-xl", "rope", "t5"])
@torch.no_grad()
def test_an_ensemble_with_a_cache(case: str) -> None:
    model, ids = swapped("gpt2", case), token_ids(2, 10)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    members = [weights, {name: weight * 1.1 for name, weight in weights.items()}]

    def run(weights: dict[str, Tensor]) -> Tensor:
        cache = DynamicCache(config=model.config)
        parts = [
            functional_call(model, weights, (part,), with_cache(model, cache)).logits for part in ids.split((6, 1, 3), dim=1)
        ]
        return torch.cat(parts, dim=1)

    together = vmap(run)({name: torch.stack([member[name] for member in members]) for name in weights})
    for index, member in enumerate(members):
        torch.testing.assert_close(together[index], run(member), atol=2e-5, rtol=1e-4)
